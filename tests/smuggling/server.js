// Answers each request with its X-Request-Id, and writes a line for each when its body has been read.
const fs = require("fs");
const http = require("http");

const server = http.createServer((request, response) => {
  let size = 0;
  request.on("data", (piece) => (size += piece.length));
  request.on("end", () => {
    const identity = request.headers["x-request-id"] || "";
    const line = [identity, request.method, request.url, size];
    fs.writeSync(1, JSON.stringify(line) + "\n");
    response.setHeader("Content-Length", identity.length);
    response.end(request.method === "HEAD" ? undefined : identity);
  });
});
server.listen(Number(process.argv[2]), "127.0.0.1");
