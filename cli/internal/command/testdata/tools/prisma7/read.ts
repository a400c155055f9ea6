import { PrismaPg } from "@prisma/adapter-pg";
import { PrismaClient } from "./generated/client";

const prisma = new PrismaClient({ adapter: new PrismaPg({ connectionString: process.env.DATABASE_URL }) });
const show = (x: unknown) => console.log(JSON.stringify(x));

await prisma.post.create({ data: { id: "1", title: "Hello", userId: "user_ada" } });
await prisma.post.create({ data: { id: "2", title: "Orphan", userId: "user_gone" } });
const user = await prisma.liveUser.findUnique({ where: { id: "user_ada" }, include: { posts: true, memberships: { include: { organization: true } }, emails: true } });
JSON.stringify(user);
show({ id: user?.id, email: user?.email, posts: user?.posts.map(({ title }) => ({ title })) });
show(await prisma.post.findMany({ select: { title: true, user: { select: { firstName: true } } }, orderBy: { id: "asc" } }));
const row = await prisma.user.findUniqueOrThrow({ where: { id: "user_ada" } });
show({ version: String(row.version) });
try {
  await (prisma.liveUser as any).deleteMany();
} catch {
  console.log("no writes");
}
await prisma.$disconnect();
