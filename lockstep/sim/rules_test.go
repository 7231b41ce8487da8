//go:build !sabotage

package sim

import (
	"os/exec"
	"testing"

	"github.com/stretchr/testify/require"
)

// TestBrokenRules runs sabotage_test.go, which needs a build of its own: no other build has the
// switches.
func TestBrokenRules(t *testing.T) {
	if testing.Short() {
		t.Skip("skipped: -short, and this compiles the package a second time")
	}
	out, err := exec.Command("go", "test", "-tags", "sabotage", "-run", "^TestBrokenRules$", "-v", ".").CombinedOutput()
	t.Logf("%s", out)
	require.NoError(t, err)
}
