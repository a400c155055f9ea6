import { pgTable, text } from "drizzle-orm/pg-core";

export const posts = pgTable("posts", { id: text().primaryKey(), title: text().notNull(), userId: text("user_id").notNull() });
