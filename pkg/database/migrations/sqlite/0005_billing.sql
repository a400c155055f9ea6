-- +goose Up
CREATE TABLE subscriptions (
    id                    text PRIMARY KEY,
    source                text NOT NULL,                              -- the configured Clerk instance
    status                text,
    payer_user_id         text,
    payer_organization_id text,
    latest_payment_id     text,
    active_at             datetime,
    past_due_at           datetime,
    canceled_at           datetime,
    ended_at              datetime,
    clerk_created_at      datetime,
    clerk_updated_at      datetime,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            datetime,                                   -- set: a tombstone, the object is gone at Clerk
    raw                   text NOT NULL,                              -- the object, as Clerk sent it
    event_id              text NOT NULL,                              -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             datetime NOT NULL                           -- when the row was written
);
-- What does this person, or this organization, pay for. A payer is one of the two.
CREATE INDEX subscriptions_payer_user ON subscriptions (payer_user_id) WHERE payer_user_id IS NOT NULL;
CREATE INDEX subscriptions_payer_organization ON subscriptions (payer_organization_id) WHERE payer_organization_id IS NOT NULL;

CREATE TABLE subscription_items (
    id                    text PRIMARY KEY,
    source                text NOT NULL,                              -- the configured Clerk instance
    subscription_id       text,
    status                text,
    payer_user_id         text,
    payer_organization_id text,
    plan_id               text,
    plan_slug             text,
    plan_name             text,
    plan_period           text,
    amount                bigint,                                     -- in cents
    currency              text,
    is_free_trial         boolean NOT NULL DEFAULT false,
    period_start          datetime,
    period_end            datetime,
    past_due_at           datetime,
    canceled_at           datetime,
    ended_at              datetime,
    clerk_created_at      datetime,
    clerk_updated_at      datetime,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            datetime,                                   -- set: a tombstone, the object is gone at Clerk
    raw                   text NOT NULL,                              -- the object, as Clerk sent it
    event_id              text NOT NULL,                              -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             datetime NOT NULL                           -- when the row was written
);
-- The items of a subscription.
CREATE INDEX subscription_items_subscription ON subscription_items (subscription_id);

CREATE TABLE payment_attempts (
    id                    text PRIMARY KEY,
    source                text NOT NULL,                              -- the configured Clerk instance
    status                text,
    charge_type           text,
    payer_user_id         text,
    payer_organization_id text,
    payment_id            text,
    invoice_id            text,
    amount                bigint,                                     -- in cents
    currency              text,
    failed_reason         text,
    billing_date          datetime,
    paid_at               datetime,
    failed_at             datetime,
    clerk_created_at      datetime,
    clerk_updated_at      datetime,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            datetime,                                   -- set: a tombstone, the object is gone at Clerk
    raw                   text NOT NULL,                              -- the object, as Clerk sent it
    event_id              text NOT NULL,                              -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             datetime NOT NULL                           -- when the row was written
);
