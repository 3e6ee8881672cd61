// The same four calls with Hono, Prisma and fetch, one process per CPU.

import cluster from "node:cluster";
import process from "node:process";
import { serve } from "@hono/node-server";
import { PrismaPg } from "@prisma/adapter-pg";
import { Hono } from "hono";
import { z } from "zod";
import { Prisma, PrismaClient } from "./generated/client.ts";

const NewUser = z.strictObject({
  email: z.email().max(254),
  name: z.string().trim().min(1).max(200),
});

const PageQuery = z.strictObject({
  limit: z.coerce.number().int().min(1).max(500).default(50),
  after: z.uuid().optional(),
});

function application(): Hono {
  const upstream = process.env.UPSTREAM_URL;
  const adapter = new PrismaPg({
    connectionString: process.env.POSTGRES_URI,
    max: Number(process.env.POOL_SIZE),
  });
  const prisma = new PrismaClient({ adapter });
  const app = new Hono();

  app.get("/users/:id", async (c) => {
    const id = z.uuid().safeParse(c.req.param("id"));
    if (!id.success) return c.json({ detail: "no such user" }, 404);
    const user = await prisma.user.findUnique({ where: { id: id.data } });
    return user ? c.json(user) : c.json({ detail: "no such user" }, 404);
  });

  app.get("/users", async (c) => {
    const query = PageQuery.safeParse(c.req.query());
    if (!query.success) return c.json({ errors: query.error.issues }, 422);
    const { limit, after } = query.data;
    const found = await prisma.user.findMany({
      where: after ? { id: { gt: after } } : undefined,
      orderBy: { id: "asc" },
      take: limit + 1,
    });
    const users = found.slice(0, limit);
    const next =
      found.length > limit ? `/users?limit=${limit}&after=${users[limit - 1].id}` : null;
    return c.json({ users, next });
  });

  app.post("/users", async (c) => {
    const body = NewUser.safeParse(await c.req.json());
    if (!body.success) return c.json({ errors: body.error.issues }, 422);
    try {
      const user = await prisma.user.create({ data: body.data });
      return c.json(user, 201, { Location: `/users/${user.id}` });
    } catch (error) {
      if (error instanceof Prisma.PrismaClientKnownRequestError && error.code === "P2002") {
        return c.json({ detail: "email taken" }, 409);
      }
      throw error;
    }
  });

  // Hono's own proxy() helper does the same with more ceremony: it is slower.
  app.all("*", async (c) => {
    const { raw } = c.req;
    const url = new URL(raw.url);
    const headers = new Headers(raw.headers);
    // fetch decodes what comes compressed.
    headers.delete("accept-encoding");
    const framed = headers.has("content-length") || headers.has("transfer-encoding");
    return fetch(upstream + url.pathname + url.search, {
      method: raw.method,
      headers,
      body: framed ? raw.body : undefined,
      duplex: "half",
      redirect: "manual",
    });
  });

  return app;
}

if (cluster.isPrimary) {
  for (let i = 0; i < Number(process.env.WORKERS); i++) cluster.fork();
  process.on("SIGTERM", () => process.exit());
} else {
  serve({ fetch: application().fetch, hostname: "127.0.0.1", port: Number(process.env.PORT) });
}
