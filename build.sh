#!/usr/bin/env bash
# build.sh: everything that is done with this repository. "./build.sh help" lists the verbs.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")"

readonly OUT=build
readonly BIN=$OUT/bin
readonly LINT_VERSION=v2.15.0

# What the build and the tests need besides Go, as Debian calls it:
#   gcc                                  assembles the test guests (their images are committed)
#   seabios ovmf ipxe-qemu               firmware, and the option ROM that boots over the network
#   qemu-system-x86 acpica-tools         the oracles that tests compare with
#   ipxe memtest86+ grub-* xorriso mtools  foreign programs that tests boot, and what packs them
#   iproute2 socat                       networks and sockets of the tests
readonly PACKAGES=(
	gcc
	seabios ovmf ipxe-qemu
	qemu-system-x86 acpica-tools
	ipxe memtest86+ grub-pc-bin grub-common xorriso mtools
	iproute2 socat
)

usage() {
	cat <<-END
		usage: ./build.sh VERB

		  deps            install what is missing of Debian's packages (needs root)
		  build           build $OUT/ftvmm
		  test [ARG…]     deps, build, then all tests but the slow ones; ARGs go to "go test"
		  test-slow       as test, with the slow tests too (tag "slow")
		  lint            gofmt, go vet, golangci-lint, purity, shellcheck where there is one
		  bench [ARG…]    compare with QEMU; see "go run ./tools/bench -help"
		  fuzz [SECONDS]  every fuzz target in turn, SECONDS each (default 10)
		  sim [ARG…]      the lockstep protocol in its simulator: --seeds N, --seed S, --trace
		  demo [ARG…]     deps, build, then "ftvmm demo"
		  clean           remove $OUT
		  help            this
	END
}

say() { printf '== %s\n' "$*" >&2; }
die() {
	printf 'build.sh: %s\n' "$*" >&2
	exit 1
}

# missing prints the packages that are not installed.
missing() {
	local p
	for p in "${PACKAGES[@]}"; do
		[[ $(dpkg-query -W -f '${db:Status-Status}' "$p" 2>/dev/null) == installed ]] || echo "$p"
	done
}

deps() {
	command -v go >/dev/null || die "there is no Go; go.mod says which version is needed"
	if ! command -v dpkg-query >/dev/null; then
		say "this is no Debian: install what corresponds to: ${PACKAGES[*]}"
		return
	fi
	local want
	mapfile -t want < <(missing)
	((${#want[@]})) || return 0
	[[ $(id -u) == 0 ]] || die "these packages are missing, and only root can install them: ${want[*]}"
	say "installing ${want[*]}"
	export DEBIAN_FRONTEND=noninteractive
	apt-get update -q >&2
	apt-get install -q -y --no-install-recommends "${want[@]}" >&2
}

# version is the tag or commit that is being built.
version() { git describe --tags --always --dirty 2>/dev/null || echo devel; }

build() {
	say "building $OUT/ftvmm"
	mkdir -p "$OUT"
	CGO_ENABLED=0 go build -trimpath -ldflags "-s -w -X main.version=$(version)" -o "$OUT/ftvmm" ./tools/ftvmm
}

# The summary of "go test" is the last thing that is printed.
run_tests() {
	deps
	build
	say "testing"
	go test "$@"
}

fetch_lint() {
	[[ -x $BIN/golangci-lint && -f $BIN/golangci-lint.$LINT_VERSION ]] && return
	say "building golangci-lint $LINT_VERSION (a minute, once)"
	mkdir -p "$BIN"
	rm -f "$BIN"/golangci-lint*
	GOBIN=$PWD/$BIN go install "github.com/golangci/golangci-lint/v2/cmd/golangci-lint@$LINT_VERSION"
	touch "$BIN/golangci-lint.$LINT_VERSION"
}

lint() {
	local unformatted scripts
	fetch_lint
	say "gofmt"
	unformatted=$(git ls-files -z '*.go' | xargs -0 gofmt -l)
	[[ -z $unformatted ]] || die "not formatted by gofmt: $unformatted"
	say "go vet"
	go vet ./...
	say "purity: devices and firmware are deterministic"
	go run ./tools/purity
	say "golangci-lint"
	"$BIN/golangci-lint" run ./...
	mapfile -t scripts < <(git ls-files '*.sh' .ci/run)
	say "shell scripts"
	bash -n "${scripts[@]}"
	if command -v shellcheck >/dev/null; then
		shellcheck "${scripts[@]}"
	fi
}

# fuzz_one runs one fuzz target. On a busy machine go test fails at the end of its time with "context deadline exceeded" and
# nothing else, which says nothing about the target: then the caller tries again.
fuzz_one() {
	local out
	out=$(mktemp)
	if go test "$1" -run '^$' -fuzz "^$2\$" -fuzztime "${3}s" -fuzzminimizetime 10x 2>&1 | tee "$out"; then
		rm -f "$out"
		return 0
	fi
	if grep -q 'context deadline exceeded' "$out" && ! grep -q 'Failing input' "$out"; then
		rm -f "$out"
		say "$1 $2: go test ran out of time; once more"
		return 1
	fi
	rm -f "$out"
	die "fuzz: $1 $2 fails"
}

fuzz() {
	local seconds=${1:-10} pkg target
	[[ $seconds =~ ^[1-9][0-9]*$ ]] || die "fuzz: \"$seconds\" is no number of seconds"
	while read -r pkg; do
		while read -r target; do
			say "$pkg $target"
			fuzz_one "$pkg" "$target" "$seconds" || fuzz_one "$pkg" "$target" "$seconds"
		done < <(go test "$pkg" -list '^Fuzz' | grep '^Fuzz' || true)
	done < <(git grep -l '^func Fuzz' -- '*_test.go' | xargs -r -n1 dirname | sort -u | sed 's|^|./|')
}

main() {
	local verb=${1:-help}
	(($#)) && shift
	case $verb in
	deps) deps ;;
	build) build ;;
	test) run_tests -timeout 40m "$@" ./... ;;
	test-slow) run_tests -tags slow -timeout 120m "$@" ./... ;;
	lint) lint ;;
	bench) exec go run ./tools/bench "$@" ;;
	fuzz) fuzz "$@" ;;
	sim) go run ./tools/sim "$@" ;;
	demo)
		deps
		build
		exec "$OUT/ftvmm" demo "$@"
		;;
	clean) rm -rf "$OUT" ;;
	help | -h | --help) usage ;;
	*)
		usage >&2
		die "there is no verb \"$verb\""
		;;
	esac
}

main "$@"
