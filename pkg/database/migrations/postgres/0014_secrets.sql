-- +goose Up
-- Alerts of silence held a link to the webhook portal, with which anyone is logged in there.
UPDATE notifications
SET body = substr(body, 1, strpos(body, '1. Open http') - 1) || '1. Run `usher portal` and open the link that it prints'
    || substr(body, strpos(body, chr(10) || '2. Look'))
WHERE kind = 'silence' AND strpos(body, '1. Open http') > 0 AND strpos(body, chr(10) || '2. Look') > strpos(body, '1. Open http');
