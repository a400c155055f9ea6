-- +goose Up
CREATE TABLE organizations (
    id                      text PRIMARY KEY,
    source                  text NOT NULL,                              -- the configured Clerk instance
    name                    text,
    slug                    text,
    image_url               text,
    has_image               boolean NOT NULL DEFAULT false,
    created_by              text,
    max_allowed_memberships bigint,
    members_count           bigint,
    public_metadata         jsonb,
    private_metadata        jsonb,
    clerk_created_at        timestamptz,
    clerk_updated_at        timestamptz,
    version                 bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at                 bigint NOT NULL,                            -- ms since the epoch
    deleted_at              timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                     jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id                text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                  text NOT NULL,
    synced_at               timestamptz NOT NULL                        -- when the row was written
) WITH (fillfactor = 90);
-- Applications route by slug.
CREATE INDEX organizations_slug ON organizations (slug) WHERE deleted_at IS NULL;

CREATE TABLE organization_memberships (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    organization_id  text,
    user_id          text,
    role             text,
    role_name        text,
    permissions      jsonb,
    public_metadata  jsonb,
    private_metadata jsonb,
    clerk_created_at timestamptz,
    clerk_updated_at timestamptz,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw              jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id         text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        timestamptz NOT NULL                        -- when the row was written
);
-- Which organizations is this person in; who is in this organization.
CREATE INDEX organization_memberships_user ON organization_memberships (user_id) WHERE deleted_at IS NULL;
CREATE INDEX organization_memberships_organization ON organization_memberships (organization_id) WHERE deleted_at IS NULL;

CREATE TABLE organization_invitations (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    organization_id  text,
    email            text,
    role             text,
    role_name        text,
    status           text,
    inviter_id       text,
    user_id          text,
    expires_at       timestamptz,
    public_metadata  jsonb,
    private_metadata jsonb,
    clerk_created_at timestamptz,
    clerk_updated_at timestamptz,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw              jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id         text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        timestamptz NOT NULL                        -- when the row was written
);
-- An organization's page of invitations.
CREATE INDEX organization_invitations_organization ON organization_invitations (organization_id) WHERE deleted_at IS NULL;

CREATE TABLE organization_domains (
    id                        text PRIMARY KEY,
    source                    text NOT NULL,                              -- the configured Clerk instance
    organization_id           text,
    name                      text,
    enrollment_mode           text,
    affiliation_email         text,
    affiliation_status        text,
    ownership_status          text,
    total_pending_invitations bigint,
    total_pending_suggestions bigint,
    clerk_created_at          timestamptz,
    clerk_updated_at          timestamptz,
    version                   bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at                   bigint NOT NULL,                            -- ms since the epoch
    deleted_at                timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                       jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id                  text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin                    text NOT NULL,
    synced_at                 timestamptz NOT NULL                        -- when the row was written
);

CREATE TABLE roles (
    id                  text PRIMARY KEY,
    source              text NOT NULL,                              -- the configured Clerk instance
    key                 text,
    name                text,
    description         text,
    is_creator_eligible boolean NOT NULL DEFAULT false,
    permissions         jsonb,
    clerk_created_at    timestamptz,
    clerk_updated_at    timestamptz,
    version             bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at             bigint NOT NULL,                            -- ms since the epoch
    deleted_at          timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw                 jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id            text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin              text NOT NULL,
    synced_at           timestamptz NOT NULL                        -- when the row was written
);

CREATE TABLE permissions (
    id               text PRIMARY KEY,
    source           text NOT NULL,                              -- the configured Clerk instance
    key              text,
    name             text,
    description      text,
    type             text,
    clerk_created_at timestamptz,
    clerk_updated_at timestamptz,
    version          bigint NOT NULL,                            -- with seen_at and event_id: which state of the object wins
    seen_at          bigint NOT NULL,                            -- ms since the epoch
    deleted_at       timestamptz,                                -- set: a tombstone, the object is gone at Clerk
    raw              jsonb NOT NULL,                             -- the object, as Clerk sent it
    event_id         text COLLATE "C" NOT NULL,                  -- the event that wrote this state; compared by bytes
    origin           text NOT NULL,
    synced_at        timestamptz NOT NULL                        -- when the row was written
);

-- lz4 takes a fraction of the time of pglz. A server that was built without it keeps its default.
-- +goose StatementBegin
DO $$
BEGIN
    ALTER TABLE organizations ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE organization_memberships ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE organization_invitations ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE organization_domains ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE roles ALTER COLUMN raw SET COMPRESSION lz4;
    ALTER TABLE permissions ALTER COLUMN raw SET COMPRESSION lz4;
EXCEPTION WHEN feature_not_supported THEN
    NULL;
END
$$;
-- +goose StatementEnd
