// Clerk's objects as Usher keeps them. Printed by `usher schema drizzle`: print it again after each update of Usher, and do not edit it.
// For drizzle-orm 0.36 or newer and PostgreSQL. Read the views (liveUsers, …); write nothing here: Usher alone does, from Clerk's webhooks.
//
// drizzle-kit must not take these tables for yours. In drizzle.config.ts:
//   schema: "./src/db/schema.ts",  // your tables, and not this file
//   schemaFilter: ["public"],      // your schemas, and not "public"
// Never reference a column of these tables with .references(): that makes a foreign key.
// Usher's tables are in the schema public: tell drizzle-kit so, or its push drops them:
//   tablesFilter: ["*", "!audit_log", "!deliveries", "!drifts", "!goose_db_version", "!notifications", "!organization_domains", "!organization_invitations", "!organization_memberships", "!organizations", "!payment_attempts", "!permissions", "!reconcile_runs", "!roles", "!sessions", "!stream_watch", "!subscription_items", "!subscriptions", "!users", "!waitlist_entries"],
import { boolean, doublePrecision, jsonb, pgView, text, timestamp } from "drizzle-orm/pg-core";

export const liveUsers = pgView("live_users", {
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

export const liveOrganizations = pgView("live_organizations", {
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

export const liveOrganizationMemberships = pgView("live_organization_memberships", {
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

export const liveOrganizationInvitations = pgView("live_organization_invitations", {
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

export const liveOrganizationDomains = pgView("live_organization_domains", {
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

export const liveRoles = pgView("live_roles", {
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

export const livePermissions = pgView("live_permissions", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  key: text("key"),
  name: text("name"),
  description: text("description"),
  type: text("type"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveSessions = pgView("live_sessions", {
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

export const liveWaitlistEntries = pgView("live_waitlist_entries", {
  id: text("id").notNull(),
  source: text("source").notNull(),
  email: text("email"),
  status: text("status"),
  isLocked: boolean("is_locked").notNull(),
  invitationId: text("invitation_id"),
  clerkCreatedAt: timestamp("clerk_created_at", { withTimezone: true }),
  clerkUpdatedAt: timestamp("clerk_updated_at", { withTimezone: true }),
}).existing();

export const liveSubscriptions = pgView("live_subscriptions", {
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

export const liveSubscriptionItems = pgView("live_subscription_items", {
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

export const livePaymentAttempts = pgView("live_payment_attempts", {
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

export const userEmails = pgView("user_emails", {
  userId: text("user_id").notNull(),
  id: text("id"),
  emailAddress: text("email_address"),
  verified: boolean("verified").notNull(),
  isPrimary: boolean("is_primary").notNull(),
}).existing();

export const userPhones = pgView("user_phones", {
  userId: text("user_id").notNull(),
  id: text("id"),
  phoneNumber: text("phone_number"),
  verified: boolean("verified").notNull(),
  isPrimary: boolean("is_primary").notNull(),
}).existing();

export const userAccounts = pgView("user_accounts", {
  userId: text("user_id").notNull(),
  id: text("id"),
  provider: text("provider"),
  providerUserId: text("provider_user_id"),
  emailAddress: text("email_address"),
  username: text("username"),
  verified: boolean("verified").notNull(),
}).existing();
