import "dotenv/config";
import { readFileSync } from "node:fs";
import { defineConfig, env } from "prisma/config";

const usher = readFileSync("prisma/usher.prisma", "utf8").match(/(?<=^\/\/ external: ).+$/gm) ?? [];

export default defineConfig({
  schema: "prisma",
  migrations: { path: "prisma/migrations" },
  datasource: { url: env("DATABASE_URL") },
  experimental: { externalTables: true },
  tables: { external: usher },
});
