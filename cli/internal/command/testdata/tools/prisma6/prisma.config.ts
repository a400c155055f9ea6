import { readFileSync } from "node:fs";
import { PrismaPg } from "@prisma/adapter-pg";
import { defineConfig } from "prisma/config";

const usher = readFileSync("prisma/usher.prisma", "utf8").match(/(?<=^\/\/ external: ).+$/gm);
if (!usher) throw new Error("prisma/usher.prisma names no tables: print it again with `usher schema prisma`");

export default defineConfig({
  schema: "prisma",
  migrations: { path: "prisma/migrations" },
  engine: "js",
  adapter: async () => new PrismaPg({ connectionString: process.env.DATABASE_URL }),
  experimental: { externalTables: true, adapter: true },
  tables: { external: usher },
});
