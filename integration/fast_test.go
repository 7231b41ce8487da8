//go:build !slow

package integration

// slow says that the tests run with the tag "slow" (./build.sh test-slow).
const slow = false
