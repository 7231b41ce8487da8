package main

import (
	"bufio"
	"bytes"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/config"
)

// Ctrl-C in the middle of the demo leaves nothing behind: no process, no network namespace, no file.
func TestDemoCleansUpWhenItIsInterrupted(t *testing.T) {
	if unix.Access(config.Default().KVM, unix.R_OK|unix.W_OK) != nil {
		t.Skipf("this host has no usable %s", config.Default().KVM)
	}
	tmp := t.TempDir()
	for at, args := range map[string][]string{
		"SeaBIOS (version":       {"demo"},
		"begin to run one guest": {"demo", "--firmware=false"},
		"kill -9 the primary":    {"demo", "--firmware=false"},
	} {
		cmd := exec.Command("ftvmm", args...) // made by testscript.Main
		cmd.Env = append(os.Environ(), "TMPDIR="+tmp)
		stderr, err := cmd.StderrPipe()
		require.NoError(t, err)
		require.NoError(t, cmd.Start())
		var seen bytes.Buffer
		in := bufio.NewReader(stderr)
		for !strings.Contains(seen.String(), at) {
			line, err := in.ReadString('\n')
			seen.WriteString(line)
			if err != nil {
				t.Fatalf("the demo ended before %q: %v\n%s", at, cmd.Wait(), seen.String())
			}
		}
		require.NoError(t, cmd.Process.Signal(syscall.SIGINT))
		rest, err := io.ReadAll(in)
		require.NoError(t, err)
		require.Error(t, cmd.Wait())
		require.Equal(t, exitFailed, cmd.ProcessState.ExitCode(), "%s", rest)
		require.Contains(t, string(rest), "(interrupted)")

		left, err := os.ReadDir(tmp)
		require.NoError(t, err)
		require.Empty(t, left)
		spaces, err := filepath.Glob(fmt.Sprintf("/run/netns/*-%d-*", cmd.Process.Pid)) // twins names them so
		require.NoError(t, err)
		require.Empty(t, spaces)
		commands, err := filepath.Glob("/proc/[0-9]*/cmdline")
		require.NoError(t, err)
		for _, path := range commands {
			line, _ := os.ReadFile(path) // of a process that has ended meanwhile there is none
			require.NotContains(t, string(line), tmp, "a process is left")
		}
	}
}
