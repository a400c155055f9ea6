# Bare `make` prints this list. Every recipe works from a fresh clone and asks nothing.

SHELL := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
MAKEFLAGS += --no-print-directory

MODULES  := pkg ingest worker reconciler console cli
SERVICES := ingest worker reconciler console

GOLANGCI_LINT_VERSION := 2.15.0
GOVULNCHECK_VERSION := v1.9.0
GOLANGCI_LINT := .bin/golangci-lint-$(GOLANGCI_LINT_VERSION)

# `make test` runs under the race detector, so that one run shows both. SQLite's translated C is not instrumented: it
# holds no Go code of ours and would be tenfold slower. The end-to-end tests start programs built without the detector,
# so they run alone and without it. Most tests wait: four of a package run at a time. In CI no result is taken from the cache: tests start programs that it does not know.
RACE      := -race -gcflags='modernc.org/sqlite/lib=-race=false'
TESTFLAGS ?= -parallel 4 $(if $(CI),-count=1)
PKG       ?= work
FUZZTIME  ?= 10s
BENCH     ?= .
KILLS     ?= 100
OUTAGE    ?= 2m
USERS     ?= 100000
CUTS      ?= 10
FREEZE    ?= 20s
FLOOD     ?= 22000
FILES     ?= 1024

.PHONY: help
help: ## print this list
	@sed -nE 's/^([a-z-]+):.*## (.*)/  make \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r target text; do printf '%-14s %s\n' "$$target" "$$text"; done

# No flags of its own: with others everything would be compiled again, which `go run`, `go test` and the end-to-end tests have compiled already.
.PHONY: build
build: ## build usher and the services into bin/
	@mkdir -p bin
	@./scripts/compile build -o bin/ -- ./cli/cmd/usher $(foreach s,$(SERVICES),./$(s)/cmd/$(s))
	@echo "built bin/usher $(addprefix bin/,$(SERVICES))"

.PHONY: install
install: ## build usher and put it where `go install` does, $GOBIN or ~/go/bin
	@./scripts/compile install -- ./cli/cmd/usher
	@dir=$$(go env GOBIN); dir=$${dir:-$$(go env GOPATH | cut -d: -f1)/bin}; echo "installed $$dir/usher"; \
	case ":$$PATH:" in \
		*":$$dir:"*) [ "$$(command -v usher)" = "$$dir/usher" ] || echo "another usher comes first in PATH: $$(command -v usher)" >&2;; \
		*) echo "$$dir is not in PATH; for this shell: export PATH=\"$$dir:\$$PATH\"" >&2;; \
	esac

.PHONY: test
test: ## run every test once with the race detector; installs what is missing (PostgreSQL, PgBouncer, strace, a C compiler)
	@./scripts/need postgres pgbouncer cc strace
	@packages=$$(go list $(PKG)); \
	if unit=$$(grep -v /cli/e2e <<<"$$packages"); then echo "--- all but cli/e2e, with the race detector"; go test -timeout 15m $(RACE) $(TESTFLAGS) $$unit; fi; \
	if e2e=$$(grep /cli/e2e <<<"$$packages"); then echo "--- cli/e2e"; go test -timeout 15m $(TESTFLAGS) $$e2e; fi

.PHONY: race
race: ## hunt for flaky tests: three times, shuffled, with the race detector
	@./scripts/need postgres pgbouncer cc strace
	go test -timeout 45m $(RACE) -count=3 -shuffle=on $(PKG)

# In CI the tests have run in the workspace already: what can differ alone is what they are built from, so they are built and linked.
ALONE_TESTS := $(if $(CI),-run '^$$')

.PHONY: alone
alone: ## vet, build and test each module without the workspace, as if it were the only one
	@$(if $(CI),,./scripts/need postgres pgbouncer strace)
	@for m in $(MODULES); do echo "--- $$m"; (cd $$m && GOWORK=off go vet ./... && GOWORK=off go build ./... && GOWORK=off go test -timeout 15m $(ALONE_TESTS) ./...); done

.PHONY: lint
lint: $(GOLANGCI_LINT) ## run the linters and the import rules, and prove that the rules catch what they forbid
	$(GOLANGCI_LINT) run $(foreach m,$(MODULES),./$(m)/...)
	@./scripts/lint-rules $(GOLANGCI_LINT)

.PHONY: format
format: $(GOLANGCI_LINT) ## rewrite the code as the linter wants it, where it knows how
	$(GOLANGCI_LINT) run --fix $(foreach m,$(MODULES),./$(m)/...)

# A linter of the right version that is already on the machine is taken; else it is built from source.
$(GOLANGCI_LINT):
	@mkdir -p .bin
	@if have=$$(command -v golangci-lint) && golangci-lint version 2>/dev/null | grep -qF 'version $(GOLANGCI_LINT_VERSION) '; then \
		echo "taking golangci-lint $(GOLANGCI_LINT_VERSION) from $$have"; cp "$$have" $@; \
	else \
		echo "building golangci-lint $(GOLANGCI_LINT_VERSION), once; this takes a few minutes"; \
		GOBIN=$(CURDIR)/.bin go install github.com/golangci/golangci-lint/v2/cmd/golangci-lint@v$(GOLANGCI_LINT_VERSION) 2>&1 | sed -E 's#https?://[^/ "]+#…#g'; \
		mv .bin/golangci-lint $@; \
	fi

.PHONY: verify
verify: ## check go.mod, go.work, formatting, generated files, and what the binaries link
	@./scripts/verify

.PHONY: vuln
vuln: ## look for published advisories about what the programs call; VULNDB=file:///… is a copy of the vulnerability database
	go run golang.org/x/vuln/cmd/govulncheck@$(GOVULNCHECK_VERSION) $(if $(VULNDB),-db $(VULNDB)) $(foreach m,$(MODULES),./$(m)/...)

.PHONY: schema-check
schema-check: ## hold the models of `usher schema` against the real Prisma and Drizzle; needs node and npm
	@./scripts/need postgres
	go test -tags npm -count=1 -timeout 15m -run 'PrismaAndDrizzle' -v ./cli/internal/command

.PHONY: fuzz
fuzz: ## run every fuzz target for FUZZTIME (10s)
	@grep -rlE --include='*_test.go' '^func Fuzz' $(MODULES) | while read -r file; do \
		grep -oE '^func Fuzz[A-Za-z0-9_]+' "$$file" | while read -r _ target; do \
			echo "--- $$target in $$(dirname "$$file")"; \
			go test -run '^$$' -fuzz "^$$target\$$" -fuzztime $(FUZZTIME) "./$$(dirname "$$file")" </dev/null; \
		done; \
	done

.PHONY: bench
bench: ## run the benchmarks; BENCH=regexp and PKG=./worker/... choose some
	@./scripts/need postgres
	go test -run '^$$' -bench '$(BENCH)' -benchmem -timeout 60m -p 1 $(PKG)

.PHONY: chaos
chaos: ## kill, stop and flood for long: KILLS (100) in each run, OUTAGE (2m) of database and broker
	@./scripts/need postgres
	USHER_CHAOS_KILLS=$(KILLS) USHER_E2E_KILLS=$(KILLS) USHER_CHAOS_OUTAGE=$(OUTAGE) USHER_E2E_LARGE=228 go test -count=1 -p 1 -timeout 60m -v \
		-run 'Killed|OutagesUnderLoad|LargestEvents' ./cli/e2e/
	go test -count=1 -timeout 30m -v -run 'Flood|Outage|Deadlock|DiskFull' ./worker/ | grep -vE '^\s+logger.go'

.PHONY: cluster
cluster: ## three brokers under load and junk: killed, frozen for FREEZE (20s), restarted in turn, majority lost and back
	@./scripts/need postgres
	USHER_CHAOS_FREEZE=$(FREEZE) go test -count=1 -timeout 20m -v -run ThreeBrokersUnderLoad ./cli/e2e/

.PHONY: powercut
powercut: ## cut the power CUTS (10) times under serve, its database, and three brokers; needs Linux, /dev/fuse and root
	@[ -w /dev/fuse ] && [ "$$(id -u)" -eq 0 ] || { echo "make powercut mounts a disk of its own: it needs Linux, /dev/fuse and root" >&2; exit 1; }
	@./scripts/need postgres
	USHER_POWER_CUTS=$(CUTS) go test -count=1 -timeout 60m -v -run 'PowerCut|ProcessesSeeTheDisk' ./cli/e2e/...

.PHONY: flood
flood: ## FLOOD (22000) silent, slow and forging connections against a serve that may open FILES (1024), while signed deliveries come
	USHER_FLOOD=$(FLOOD) USHER_FLOOD_DESCRIPTORS=$(FILES) go test -count=1 -timeout 20m -v -run StrangersDoNoHarm ./cli/e2e/

.PHONY: backfill
backfill: ## backfill USERS (100000) users within production limits, killed four times on the way, on both databases
	@./scripts/need postgres
	USHER_TEST_BACKFILL=$(USERS) go test -count=1 -parallel 1 -timeout 30m -v -run BackfillThatIsKilled ./cli/e2e/

.PHONY: demo
demo: ## let an offline Clerk tell its story, and print the ledger
	@./scripts/compile build -o bin/ -- ./cli/cmd/usher
	bin/usher dev --demo --exit

.PHONY: clean
clean: ## remove what was built, the linter too
	rm -rf bin .bin dist
