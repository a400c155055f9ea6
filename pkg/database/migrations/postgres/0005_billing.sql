-- +goose Up
CREATE TABLE subscriptions (
    id                    text PRIMARY KEY,
    source                text NOT NULL,                              -- the configured Clerk instance
    status                text,
    payer_user_id         text,
    payer_organization_id text,
    latest_payment_id     text,
    active_at             timestamptz,
    past_due_at           timestamptz,
    canceled_at           timestamptz,
    ended_at              timestamptz,
    clerk_created_at      timestamptz,
    clerk_updated_at      timestamptz,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                   jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id              text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             timestamptz NOT NULL                        -- when the row was written
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
    period_start          timestamptz,
    period_end            timestamptz,
    past_due_at           timestamptz,
    canceled_at           timestamptz,
    ended_at              timestamptz,
    clerk_created_at      timestamptz,
    clerk_updated_at      timestamptz,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                   jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id              text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             timestamptz NOT NULL                        -- when the row was written
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
    billing_date          timestamptz,
    paid_at               timestamptz,
    failed_at             timestamptz,
    clerk_created_at      timestamptz,
    clerk_updated_at      timestamptz,
    version               bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at               bigint NOT NULL,                            -- ms since the epoch
    deleted_at            timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                   jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id              text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                text NOT NULL,
    synced_at             timestamptz NOT NULL                        -- when the row was written
);

-- lz4 takes a fraction of the time of pglz. A server that was built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE subscriptions ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE subscription_items ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE payment_attempts ALTER COLUMN raw SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd
