# Everything is done through make; `make` alone lists what there is.
SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
MAKEFLAGS   += --no-print-directory --no-builtin-rules
.DEFAULT_GOAL := help

BUILD := $(CURDIR)/build
TOOLS := $(BUILD)/tools

# A release is a tag; anything else keeps the version written in
# internal/version. The commit is stamped either way.
TAG     := $(patsubst v%,%,$(shell git describe --tags --exact-match --match 'v*' 2>/dev/null))
COMMIT  := $(shell git describe --always --abbrev=12 --dirty --exclude '*' 2>/dev/null)
VERPKG  := github.com/bivouac-run/bivouac/internal/version
LDFLAGS := -s -w $(if $(TAG),-X $(VERPKG).Version=$(TAG)) $(if $(COMMIT),-X $(VERPKG).Commit=$(COMMIT))
GOBUILD := CGO_ENABLED=0 go build -trimpath -ldflags '$(LDFLAGS)'

# What tests find the binaries by.
export BIVOUAC_BIN     := $(BUILD)/bin/bivouac
export BIVOUAC_SHIM    := $(BUILD)/bin/bivouac-shim
export BIVOUAC_NOMAD   := $(TOOLS)/nomad
export BIVOUAC_RUNSC   := $(TOOLS)/runsc
export BIVOUAC_CNI_DIR := $(TOOLS)/cni

# A test for RUN, a fuzzer for FUZZTIME. TIMEOUT bounds one package's tests.
RUN      ?= .
FUZZTIME ?= 20s
TIMEOUT  ?= 20m
GOTEST   := -race -count=1 -timeout $(TIMEOUT)
SUMMARY  := go run ./tools/testsummary

# Packages with and without agents to start. e2e packages run one at a time:
# each owns a Nomad agent, and two of them would measure each other.
# (-e: a package that does not compile is a failed test, not a missing one.)
UNIT = unit=$$(go list -e ./... | grep -v /e2e)
E2E  = $(if $(wildcard e2e/*.go e2e/*/*.go),-- $(GOTEST) -p 1 ./e2e/...)

.PHONY: help
help: ## List the targets
	@awk -F ':.*## ' '/^[a-z0-9%-]+:.*## / { printf "  %-14s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

## Build and run

.PHONY: build
build: ## Build bivouac and bivouac-shim into build/bin/
	$(GOBUILD) -o $(BIVOUAC_BIN) .
	$(GOBUILD) -o $(BIVOUAC_SHIM) ./driver/shim/bivouac-shim

.PHONY: tools
tools: ## Put the pinned Nomad, runsc and CNI plugins into build/tools/
	@tools/install nomad runsc cni

.PHONY: tools-all
tools-all: tools ## The same, and Consul and Vault
	@tools/install consul vault

.PHONY: run
run: need-root build tools ## Start a Nomad agent with the driver, on this machine
	@./deploy/dev/run

.PHONY: stop
stop: need-root ## Stop that agent and remove what it left
	@./deploy/dev/stop

## Test

.PHONY: test
test: need-root build tools ## Unit, root and e2e tests
	@$(UNIT); $(SUMMARY) -- $(GOTEST) -p 2 $$unit $(E2E)

.PHONY: test-unit
test-unit: ## The tests that need neither root nor other programs
	@$(UNIT); BIVOUAC_CI= CI= $(SUMMARY) -- $(GOTEST) -short $$unit

.PHONY: test-root
test-root: need-root build tools ## Unit tests and those that need root, no agents
	@$(UNIT); $(SUMMARY) -- $(GOTEST) -p 2 $$unit

.PHONY: e2e
e2e: need-root build tools ## End-to-end tests with real agents: make e2e RUN=regexp
	@$(SUMMARY) -- $(GOTEST) -p 1 -run '$(RUN)' ./e2e/...

.PHONY: test-tools
test-tools: ## Test the build scripts: shellcheck, make tools twice
	@tools/install-test

.PHONY: fuzz
fuzz: ## Run each fuzzer for FUZZTIME (20s)
	@grep -rl --include='*_test.go' '^func Fuzz' . | sort | while read -r file; do \
		for f in $$(sed -n 's/^func \(Fuzz[A-Za-z0-9_]*\)(.*/\1/p' "$$file"); do \
			echo "$$f in $$(dirname "$$file")"; \
			go test -run '^$$' -fuzz "^$$f\$$" -fuzztime $(FUZZTIME) "$$(dirname "$$file")"; \
		done; \
	done

.PHONY: bench-start
bench-start: need-root build tools ## Start-up times beside those of peers; writes build/bench-start.json
	@go run ./e2e/bench start

## Check

.PHONY: check
check: lint test-tools test ## All that CI runs

.PHONY: lint
lint: lint-fast ## gofmt, go vet, go mod tidy and golangci-lint
	@go mod tidy -diff >/dev/null || { echo "go.mod or go.sum is not tidy: go mod tidy" >&2; exit 1; }
	@tools/install lint
	$(TOOLS)/lint/golangci-lint run ./...

.PHONY: lint-fast
lint-fast: ## gofmt and go vet
	@bad=$$(git ls-files -co --exclude-standard '*.go' | xargs gofmt -l); \
		if [ -n "$$bad" ]; then echo "not gofmt'ed (make fmt):"; echo "$$bad"; exit 1; fi
	go vet ./...

.PHONY: vuln
vuln: ## Look the dependencies up in Go's vulnerability database
	@tools/install lint
	$(TOOLS)/lint/govulncheck ./...

.PHONY: deps
deps: ## Write deps.txt anew: the modules linked into the binaries
	go test -count=1 -run '^TestDependencyList$$' . -update

.PHONY: fmt
fmt: ## Format the Go files
	@git ls-files -co --exclude-standard '*.go' | xargs gofmt -w

.PHONY: clean
clean: ## Remove build/ (the tools stay in their cache)
	rm -rf $(BUILD)

.PHONY: need-root
need-root:
	@if [ "$$(id -u)" != 0 ]; then \
		echo "this target makes namespaces, cgroups and nftables rules and must run as root" >&2; \
		echo "hint: sudo -E env PATH=\"\$$PATH\" make $(MAKECMDGOALS); without root, make test-unit" >&2; \
		exit 1; \
	fi
