-- +goose Up
-- A child lives no longer than its parents. children_deleted_at is what the children of a row know of its deleted_at.
ALTER TABLE users ADD COLUMN children_deleted_at datetime;
ALTER TABLE organizations ADD COLUMN children_deleted_at datetime;
ALTER TABLE organization_memberships ADD COLUMN deleted_with text;   -- the parent that took the row along; NULL: it lives, or was deleted itself
ALTER TABLE organization_invitations ADD COLUMN deleted_with text;
ALTER TABLE organization_domains ADD COLUMN deleted_with text;
ALTER TABLE sessions ADD COLUMN deleted_with text;

-- The children of a parent, those included that may come back with it.
DROP INDEX organization_memberships_user;
DROP INDEX organization_memberships_organization;
DROP INDEX organization_invitations_organization;
CREATE INDEX organization_memberships_user ON organization_memberships (user_id);
CREATE INDEX organization_memberships_organization ON organization_memberships (organization_id);
CREATE INDEX organization_invitations_organization ON organization_invitations (organization_id);
CREATE INDEX organization_domains_organization ON organization_domains (organization_id);

-- A time that was more than a day ahead is not believed any more: such a row takes the time at which it was written, so that changes reach it again.
UPDATE users SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE organizations SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE organization_memberships SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE organization_invitations SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE organization_domains SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE sessions SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE roles SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE permissions SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE waitlist_entries SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE subscriptions SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE subscription_items SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;
UPDATE payment_attempts SET version = min(version, (CAST(strftime('%s', synced_at) AS integer) * 1000)), seen_at = min(seen_at, (CAST(strftime('%s', synced_at) AS integer) * 1000)) WHERE max(version, seen_at) > (CAST(strftime('%s', synced_at) AS integer) * 1000) + 86400000;

-- What was deleted before this version.
UPDATE organization_memberships AS c SET deleted_at = p.deleted_at, deleted_with = p.id, synced_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
FROM organizations AS p WHERE p.id = c.organization_id AND p.source = c.source AND p.deleted_at IS NOT NULL AND c.deleted_at IS NULL;
UPDATE organization_memberships AS c SET deleted_at = p.deleted_at, deleted_with = p.id, synced_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
FROM users AS p WHERE p.id = c.user_id AND p.source = c.source AND p.deleted_at IS NOT NULL AND c.deleted_at IS NULL;
UPDATE organization_invitations AS c SET deleted_at = p.deleted_at, deleted_with = p.id, synced_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
FROM organizations AS p WHERE p.id = c.organization_id AND p.source = c.source AND p.deleted_at IS NOT NULL AND c.deleted_at IS NULL;
UPDATE organization_domains AS c SET deleted_at = p.deleted_at, deleted_with = p.id, synced_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
FROM organizations AS p WHERE p.id = c.organization_id AND p.source = c.source AND p.deleted_at IS NOT NULL AND c.deleted_at IS NULL;
UPDATE sessions AS c SET deleted_at = p.deleted_at, deleted_with = p.id, synced_at = strftime('%Y-%m-%d %H:%M:%f+00:00', 'now')
FROM users AS p WHERE p.id = c.user_id AND p.source = c.source AND p.deleted_at IS NOT NULL AND c.deleted_at IS NULL;
UPDATE users SET children_deleted_at = deleted_at WHERE deleted_at IS NOT NULL;
UPDATE organizations SET children_deleted_at = deleted_at WHERE deleted_at IS NOT NULL;

-- Parents whose children are to be settled: hardly any, at any time.
CREATE INDEX users_unsettled ON users (id) WHERE deleted_at IS DISTINCT FROM children_deleted_at;
CREATE INDEX organizations_unsettled ON organizations (id) WHERE deleted_at IS DISTINCT FROM children_deleted_at;

-- What an event changed: NULL where the handler does not say, or the event is not processed.
ALTER TABLE deliveries ADD COLUMN effect text CHECK (effect IN ('applied', 'older', 'unchanged', 'deleted', 'unknown_type', 'stub'));
-- What changed nothing is rare and looked for.
CREATE INDEX deliveries_effect ON deliveries (effect, received_at) WHERE effect <> 'applied';
