module github.com/usherhq/usher/cli

go 1.26.0

require (
	github.com/usherhq/usher/console v0.0.0
	github.com/usherhq/usher/ingest v0.0.0
	github.com/usherhq/usher/pkg v0.0.0
	github.com/usherhq/usher/reconciler v0.0.0
	github.com/usherhq/usher/worker v0.0.0
)

replace (
	github.com/usherhq/usher/console => ../console
	github.com/usherhq/usher/ingest => ../ingest
	github.com/usherhq/usher/pkg => ../pkg
	github.com/usherhq/usher/reconciler => ../reconciler
	github.com/usherhq/usher/worker => ../worker
)
