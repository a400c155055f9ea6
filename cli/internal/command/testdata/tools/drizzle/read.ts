import { eq } from "drizzle-orm";
import { drizzle } from "drizzle-orm/node-postgres";
import pg from "pg";
import { posts } from "./schema";
import * as usher from "./usher";

const client = new pg.Pool({ connectionString: process.env.DATABASE_URL });
const db = drizzle(client, { schema: { ...usher, posts } });
const { liveUsers } = usher;

await db.insert(posts).values([{ id: "1", title: "Hello", userId: "user_ada" }, { id: "2", title: "Orphan", userId: "user_gone" }]);
console.log(JSON.stringify(await db.select({ title: posts.title, author: liveUsers.firstName }).from(posts).leftJoin(liveUsers, eq(liveUsers.id, posts.userId)).orderBy(posts.id)));
console.log(JSON.stringify(await db.query.users.findFirst({ columns: { id: true, version: true }, with: { sessions: true } })));
await client.end();
