// Every call of the API, in strict TypeScript, with what openapi-typescript made of the document.
import createClient from "openapi-fetch";
import type { components, paths } from "./gatehouse.js";

type User = components["schemas"]["User"];

const [baseUrl, token] = process.argv.slice(2);
const client = createClient<paths>({ baseUrl, headers: { Authorization: `Bearer ${token}` } });
const id = "01936f3e-0000-7000-8000-000000000009";
const path = { id };
const asText = { parseAs: "text", bodySerializer: (body: unknown) => String(body) } as const;
const said: unknown[] = [];

const created = await client.POST("/users", { body: { email: "ann@example.com", name: "Ann" } });
const user: User | string | undefined = created.data;
said.push(created.response.status, typeof user === "object" && user.name);

const taken = await client.POST("/users", { body: { email: "ann@example.com", name: "Ann" } });
said.push(taken.response.status, taken.error?.type);

const put = await client.PUT("/users/{id}", {
  params: { path, header: { "If-None-Match": "*" } },
  body: { email: "bob@example.com", name: "Bob", metadata: { plan: "pro" } },
});
said.push(put.response.status, put.data?.email);

const version = put.response.headers.get("ETag") ?? "";
const patched = await client.PATCH("/users/{id}", {
  params: { path, header: { "If-Match": version } },
  body: { name: "Robert" },
});
said.push(patched.response.status, patched.data?.name);

const late = await client.PATCH("/users/{id}", {
  params: { path, header: { "If-Match": version } },
  body: { name: "Bert" },
});
said.push(late.response.status, late.error?.title);

const got = await client.GET("/users/{id}", { params: { path } });
said.push(got.response.status, got.data?.metadata.plan);

const page = await client.GET("/users", { params: { query: { limit: 1, count: true } } });
if (typeof page.data !== "object") throw new Error("This was no page.");
said.push(page.response.status, page.data.users.length, page.data.total);

const imported = await client.POST("/users", {
  ...asText,
  headers: { "Content-Type": "text/csv" },
  body: "email,name\neve@example.com,Eve\n",
});
said.push(imported.response.status, String(imported.data).includes('"created": 1'));

const exported = await client.GET("/users", { parseAs: "text", headers: { Accept: "text/csv" } });
said.push(exported.response.status, String(exported.data).trim().split("\n").length);

const deleted = await client.DELETE("/users/{id}", { params: { path } });
said.push(deleted.response.status);

const health = await client.GET("/health");
const live = await client.GET("/health/live");
const ready = await client.GET("/health/ready");
const metrics = await client.GET("/health/metrics", { parseAs: "text" });
said.push(health.data?.database.status, live.data?.status, ready.data?.status);
said.push(metrics.data?.includes("gatehouse_requests_total"));

console.log(JSON.stringify(said));
