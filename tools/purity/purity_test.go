package main

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"
)

// What must be deterministic is. "./build.sh lint" checks the same.
func TestDevicesAndFirmwareArePure(t *testing.T) {
	findings, err := Check("../..", "./devices/...", "./firmware/...", "./lockstep/protocol/...")
	require.NoError(t, err)
	for _, f := range findings {
		t.Error(f)
	}
}

func TestEveryViolationIsFound(t *testing.T) {
	findings, err := Check(".", "./testdata/bad")
	require.NoError(t, err)
	var got []string
	for _, f := range findings {
		got = append(got, fmt.Sprintf("%d: %s", f.Pos.Line, f.Text))
	}
	source, err := os.ReadFile(filepath.Join("testdata", "bad", "bad.go"))
	require.NoError(t, err)
	want := regexp.MustCompile(`// want "(.*)"$`)
	n := 0
	for i, line := range strings.Split(string(source), "\n") {
		m := want.FindStringSubmatch(line)
		if m == nil {
			continue
		}
		require.Less(t, n, len(got), "line %d is not found", i+1)
		require.Contains(t, got[n], fmt.Sprintf("%d: %s", i+1, m[1]))
		n++
	}
	require.Len(t, got, n, "too much is found")
	require.NotZero(t, n)
}

func TestRightCodePasses(t *testing.T) {
	findings, err := Check(".", "./testdata/good")
	require.NoError(t, err)
	require.Empty(t, findings)
}

func TestCheckReportsWhatItCannotRead(t *testing.T) {
	_, err := Check(".", "./testdata/none")
	require.Error(t, err)
}

func TestExceptionsAreStillNeeded(t *testing.T) {
	for file, imports := range exceptions {
		source, err := os.ReadFile(filepath.Join("..", "..", filepath.FromSlash(file)))
		require.NoError(t, err)
		for path, reason := range imports {
			require.NotEmpty(t, reason)
			require.Contains(t, string(source), `"`+path+`"`, "%s does not import %s any more", file, path)
		}
	}
}
