// Clerk's objects as Usher keeps them. Printed by `usher schema drizzle`: print it again after each update of Usher, and do not edit it.
// For drizzle-orm 0.36 or newer and PostgreSQL. Read the views (liveUsers, …); write nothing here: Usher alone does, from Clerk's webhooks.
//
// drizzle-kit must not take these tables for yours. In drizzle.config.ts:
//   schema: "./src/db/schema.ts",  // your tables, and not this file
//   schemaFilter: ["public"],      // your schemas, and not "usher"
// Never reference a column of these tables with .references(): that makes a foreign key.
import { relations } from "drizzle-orm";
import { bigint, boolean, doublePrecision, jsonb, pgSchema, text, timestamp } from "drizzle-orm/pg-core";

export const usher = pgSchema("usher");

export const users = usher.table("users", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  email: text("email"),
  emailVerified: boolean("email_verified").notNull(),
  phone: text("phone"),
  username: text("username"),
  firstName: text("first_name"),
  lastName: text("last_name"),
  imageUrl: text("image_url"),
  hasImage: boolean("has_image").notNull(),
  banned: boolean("banned").notNull(),
  locked: boolean("locked").notNull(),
  externalId: text("external_id"),
  publicMetadata: jsonb("public_metadata"),
  unsafeMetadata: jsonb("unsafe_metadata"),
  privateMetadata: jsonb("private_metadata"),
  lastSignInAt: timestamp("last_sign_in_at", { withTimezone: true }),
  lastActiveAt: timestamp("last_active_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  childrenDeletedAt: timestamp("children_deleted_at", { withTimezone: true }),
  lastDeletedAt: timestamp("last_deleted_at", { withTimezone: true }),
});

export const organizations = usher.table("organizations", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  name: text("name"),
  slug: text("slug"),
  imageUrl: text("image_url"),
  hasImage: boolean("has_image").notNull(),
  createdBy: text("created_by"),
  maxAllowedMemberships: bigint("max_allowed_memberships", { mode: "number" }),
  membersCount: bigint("members_count", { mode: "number" }),
  publicMetadata: jsonb("public_metadata"),
  privateMetadata: jsonb("private_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  childrenDeletedAt: timestamp("children_deleted_at", { withTimezone: true }),
});

export const organizationMemberships = usher.table("organization_memberships", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  userId: text("user_id"),
  role: text("role"),
  roleName: text("role_name"),
  permissions: jsonb("permissions"),
  publicMetadata: jsonb("public_metadata"),
  privateMetadata: jsonb("private_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  deletedWith: text("deleted_with"),
});

export const organizationInvitations = usher.table("organization_invitations", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  email: text("email"),
  role: text("role"),
  roleName: text("role_name"),
  status: text("status"),
  inviterId: text("inviter_id"),
  userId: text("user_id"),
  expiresAt: timestamp("expires_at", { withTimezone: true }),
  publicMetadata: jsonb("public_metadata"),
  privateMetadata: jsonb("private_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  deletedWith: text("deleted_with"),
});

export const organizationDomains = usher.table("organization_domains", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  name: text("name"),
  enrollmentMode: text("enrollment_mode"),
  affiliationEmail: text("affiliation_email"),
  affiliationStatus: text("affiliation_status"),
  ownershipStatus: text("ownership_status"),
  totalPendingInvitations: bigint("total_pending_invitations", { mode: "number" }),
  totalPendingSuggestions: bigint("total_pending_suggestions", { mode: "number" }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  deletedWith: text("deleted_with"),
});

export const roles = usher.table("roles", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  key: text("key"),
  name: text("name"),
  description: text("description"),
  isCreatorEligible: boolean("is_creator_eligible").notNull(),
  permissions: jsonb("permissions"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const permissions = usher.table("permissions", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  key: text("key"),
  name: text("name"),
  description: text("description"),
  type: text("type"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const sessions = usher.table("sessions", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  userId: text("user_id"),
  clientId: text("client_id"),
  status: text("status"),
  ended: boolean("ended").notNull(),
  lastActiveOrganizationId: text("last_active_organization_id"),
  actor: jsonb("actor"),
  ipAddress: text("ip_address"),
  city: text("city"),
  country: text("country"),
  browserName: text("browser_name"),
  deviceType: text("device_type"),
  isMobile: boolean("is_mobile").notNull(),
  lastActiveAt: timestamp("last_active_at", { withTimezone: true }),
  expireAt: timestamp("expire_at", { withTimezone: true }),
  abandonAt: timestamp("abandon_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
  deletedWith: text("deleted_with"),
});

export const waitlistEntries = usher.table("waitlist_entries", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  email: text("email"),
  status: text("status"),
  isLocked: boolean("is_locked").notNull(),
  invitationId: text("invitation_id"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const subscriptions = usher.table("subscriptions", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  status: text("status"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  latestPaymentId: text("latest_payment_id"),
  activeAt: timestamp("active_at", { withTimezone: true }),
  pastDueAt: timestamp("past_due_at", { withTimezone: true }),
  canceledAt: timestamp("canceled_at", { withTimezone: true }),
  endedAt: timestamp("ended_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const subscriptionItems = usher.table("subscription_items", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  subscriptionId: text("subscription_id"),
  status: text("status"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  planId: text("plan_id"),
  planSlug: text("plan_slug"),
  planName: text("plan_name"),
  planPeriod: text("plan_period"),
  amount: bigint("amount", { mode: "number" }),
  currency: text("currency"),
  isFreeTrial: boolean("is_free_trial").notNull(),
  periodStart: timestamp("period_start", { withTimezone: true }),
  periodEnd: timestamp("period_end", { withTimezone: true }),
  pastDueAt: timestamp("past_due_at", { withTimezone: true }),
  canceledAt: timestamp("canceled_at", { withTimezone: true }),
  endedAt: timestamp("ended_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const paymentAttempts = usher.table("payment_attempts", {
  id: text("id").primaryKey(),
  source: text("source").notNull(),
  status: text("status"),
  chargeType: text("charge_type"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  paymentId: text("payment_id"),
  invoiceId: text("invoice_id"),
  amount: bigint("amount", { mode: "number" }),
  currency: text("currency"),
  failedReason: text("failed_reason"),
  billingDate: timestamp("billing_date", { withTimezone: true }),
  paidAt: timestamp("paid_at", { withTimezone: true }),
  failedAt: timestamp("failed_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
  version: bigint("version", { mode: "number" }).notNull(),
  seenAt: bigint("seen_at", { mode: "number" }).notNull(),
  deletedAt: timestamp("deleted_at", { withTimezone: true }),
  raw: jsonb("raw").notNull(),
  eventId: text("event_id").notNull(),
  origin: text("origin").notNull(),
  syncedAt: timestamp("synced_at", { withTimezone: true }).notNull(),
});

export const liveUsers = usher.view("live_users", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  email: text("email"),
  emailVerified: boolean("email_verified").notNull(),
  phone: text("phone"),
  username: text("username"),
  firstName: text("first_name"),
  lastName: text("last_name"),
  imageUrl: text("image_url"),
  hasImage: boolean("has_image").notNull(),
  banned: boolean("banned").notNull(),
  locked: boolean("locked").notNull(),
  externalId: text("external_id"),
  publicMetadata: jsonb("public_metadata"),
  unsafeMetadata: jsonb("unsafe_metadata"),
  lastSignInAt: timestamp("last_sign_in_at", { withTimezone: true }),
  lastActiveAt: timestamp("last_active_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveOrganizations = usher.view("live_organizations", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  name: text("name"),
  slug: text("slug"),
  imageUrl: text("image_url"),
  hasImage: boolean("has_image").notNull(),
  createdBy: text("created_by"),
  maxAllowedMemberships: doublePrecision("max_allowed_memberships"),
  membersCount: doublePrecision("members_count"),
  publicMetadata: jsonb("public_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveOrganizationMemberships = usher.view("live_organization_memberships", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  userId: text("user_id"),
  role: text("role"),
  roleName: text("role_name"),
  permissions: jsonb("permissions"),
  publicMetadata: jsonb("public_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveOrganizationInvitations = usher.view("live_organization_invitations", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  email: text("email"),
  role: text("role"),
  roleName: text("role_name"),
  status: text("status"),
  inviterId: text("inviter_id"),
  userId: text("user_id"),
  expiresAt: timestamp("expires_at", { withTimezone: true }),
  publicMetadata: jsonb("public_metadata"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveOrganizationDomains = usher.view("live_organization_domains", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  organizationId: text("organization_id"),
  name: text("name"),
  enrollmentMode: text("enrollment_mode"),
  affiliationEmail: text("affiliation_email"),
  affiliationStatus: text("affiliation_status"),
  ownershipStatus: text("ownership_status"),
  totalPendingInvitations: doublePrecision("total_pending_invitations"),
  totalPendingSuggestions: doublePrecision("total_pending_suggestions"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveRoles = usher.view("live_roles", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  key: text("key"),
  name: text("name"),
  description: text("description"),
  isCreatorEligible: boolean("is_creator_eligible").notNull(),
  permissions: jsonb("permissions"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const livePermissions = usher.view("live_permissions", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  key: text("key"),
  name: text("name"),
  description: text("description"),
  type: text("type"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveSessions = usher.view("live_sessions", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  userId: text("user_id"),
  clientId: text("client_id"),
  status: text("status"),
  ended: boolean("ended").notNull(),
  lastActiveOrganizationId: text("last_active_organization_id"),
  actor: jsonb("actor"),
  ipAddress: text("ip_address"),
  city: text("city"),
  country: text("country"),
  browserName: text("browser_name"),
  deviceType: text("device_type"),
  isMobile: boolean("is_mobile").notNull(),
  lastActiveAt: timestamp("last_active_at", { withTimezone: true }),
  expireAt: timestamp("expire_at", { withTimezone: true }),
  abandonAt: timestamp("abandon_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveWaitlistEntries = usher.view("live_waitlist_entries", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  email: text("email"),
  status: text("status"),
  isLocked: boolean("is_locked").notNull(),
  invitationId: text("invitation_id"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveSubscriptions = usher.view("live_subscriptions", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  status: text("status"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  latestPaymentId: text("latest_payment_id"),
  activeAt: timestamp("active_at", { withTimezone: true }),
  pastDueAt: timestamp("past_due_at", { withTimezone: true }),
  canceledAt: timestamp("canceled_at", { withTimezone: true }),
  endedAt: timestamp("ended_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveSubscriptionItems = usher.view("live_subscription_items", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  subscriptionId: text("subscription_id"),
  status: text("status"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  planId: text("plan_id"),
  planSlug: text("plan_slug"),
  planName: text("plan_name"),
  planPeriod: text("plan_period"),
  amount: doublePrecision("amount"),
  currency: text("currency"),
  isFreeTrial: boolean("is_free_trial").notNull(),
  periodStart: timestamp("period_start", { withTimezone: true }),
  periodEnd: timestamp("period_end", { withTimezone: true }),
  pastDueAt: timestamp("past_due_at", { withTimezone: true }),
  canceledAt: timestamp("canceled_at", { withTimezone: true }),
  endedAt: timestamp("ended_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const livePaymentAttempts = usher.view("live_payment_attempts", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  status: text("status"),
  chargeType: text("charge_type"),
  payerUserId: text("payer_user_id"),
  payerOrganizationId: text("payer_organization_id"),
  paymentId: text("payment_id"),
  invoiceId: text("invoice_id"),
  amount: doublePrecision("amount"),
  currency: text("currency"),
  failedReason: text("failed_reason"),
  billingDate: timestamp("billing_date", { withTimezone: true }),
  paidAt: timestamp("paid_at", { withTimezone: true }),
  failedAt: timestamp("failed_at", { withTimezone: true }),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const userEmails = usher.view("user_emails", {
  userId: text("user_id").notNull(),
  id: text("id"),
  emailAddress: text("email_address"),
  verified: boolean("verified").notNull(),
  isPrimary: boolean("is_primary").notNull(),
}).existing();

export const userPhones = usher.view("user_phones", {
  userId: text("user_id").notNull(),
  id: text("id"),
  phoneNumber: text("phone_number"),
  verified: boolean("verified").notNull(),
  isPrimary: boolean("is_primary").notNull(),
}).existing();

export const userAccounts = usher.view("user_accounts", {
  userId: text("user_id").notNull(),
  id: text("id"),
  provider: text("provider"),
  providerUserId: text("provider_user_id"),
  emailAddress: text("email_address"),
  username: text("username"),
  verified: boolean("verified").notNull(),
}).existing();

export const usersRelations = relations(users, ({ many }) => ({
  memberships: many(organizationMemberships),
  invitations: many(organizationInvitations),
  sessions: many(sessions),
  subscriptions: many(subscriptions),
  paymentAttempts: many(paymentAttempts),
}));

export const organizationsRelations = relations(organizations, ({ many }) => ({
  memberships: many(organizationMemberships),
  invitations: many(organizationInvitations),
  domains: many(organizationDomains),
  subscriptions: many(subscriptions),
  paymentAttempts: many(paymentAttempts),
}));

export const organizationMembershipsRelations = relations(organizationMemberships, ({ one }) => ({
  organization: one(organizations, { fields: [organizationMemberships.organizationId], references: [organizations.id] }),
  user: one(users, { fields: [organizationMemberships.userId], references: [users.id] }),
}));

export const organizationInvitationsRelations = relations(organizationInvitations, ({ one }) => ({
  organization: one(organizations, { fields: [organizationInvitations.organizationId], references: [organizations.id] }),
  user: one(users, { fields: [organizationInvitations.userId], references: [users.id] }),
}));

export const organizationDomainsRelations = relations(organizationDomains, ({ one }) => ({
  organization: one(organizations, { fields: [organizationDomains.organizationId], references: [organizations.id] }),
}));

export const sessionsRelations = relations(sessions, ({ one }) => ({
  user: one(users, { fields: [sessions.userId], references: [users.id] }),
}));

export const subscriptionsRelations = relations(subscriptions, ({ one, many }) => ({
  payerUser: one(users, { fields: [subscriptions.payerUserId], references: [users.id] }),
  payerOrganization: one(organizations, { fields: [subscriptions.payerOrganizationId], references: [organizations.id] }),
  items: many(subscriptionItems),
}));

export const subscriptionItemsRelations = relations(subscriptionItems, ({ one }) => ({
  subscription: one(subscriptions, { fields: [subscriptionItems.subscriptionId], references: [subscriptions.id] }),
}));

export const paymentAttemptsRelations = relations(paymentAttempts, ({ one }) => ({
  payerUser: one(users, { fields: [paymentAttempts.payerUserId], references: [users.id] }),
  payerOrganization: one(organizations, { fields: [paymentAttempts.payerOrganizationId], references: [organizations.id] }),
}));
