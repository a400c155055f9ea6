module github.com/usherhq/usher/console

go 1.26.0

require github.com/usherhq/usher/pkg v0.0.0

replace github.com/usherhq/usher/pkg => ../pkg
