import "dotenv/config";
import { readFileSync } from "node:fs";
import { defineConfig, env } from "prisma/config";

const usher = readFileSync("prisma/usher.prisma", "utf8").match(/(?<=^\/\/ external: ).+$/gm);
if (!usher) throw new Error("prisma/usher.prisma names no tables: print it again with `usher schema prisma`");

export default defineConfig({
  schema: "prisma",
  migrations: { path: "prisma/migrations" },
  datasource: { url: env("DATABASE_URL") },
  experimental: { externalTables: true },
  tables: { external: usher },
});
