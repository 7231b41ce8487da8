package main

import (
	"bytes"
	"errors"
	"net"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/rogpeppe/go-internal/testscript"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/config"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"ftvmm": main})
}

// scripts runs the scripts in dir, each in a directory of its own with a runtime directory in it.
func scripts(t *testing.T, dir string) {
	testscript.Run(t, testscript.Params{
		Dir:                 dir,
		RequireExplicitExec: true,
		Setup: func(env *testscript.Env) error {
			env.Setenv("XDG_RUNTIME_DIR", env.WorkDir+"/run")
			// An address for the link of a pair, at which nobody else listens.
			l, err := net.Listen("tcp", "127.0.0.1:0")
			if err != nil {
				return err
			}
			env.Setenv("ADDRESS", l.Addr().String())
			l.Close()
			return os.Mkdir(env.WorkDir+"/run", 0o700)
		},
		Cmds: map[string]func(*testscript.TestScript, bool, []string){
			"exits":   exits,
			"waitfor": waitFor,
			"until":   until,
		},
	})
}

func TestCommandLine(t *testing.T) { scripts(t, "testdata/script") }

func TestRunningGuests(t *testing.T) {
	if unix.Access(config.Default().KVM, unix.R_OK|unix.W_OK) != nil {
		t.Skipf("this host has no usable %s", config.Default().KVM)
	}
	scripts(t, "testdata/kvm")
}

// exits runs a command and checks its exit code: "exits 64 ftvmm run --memory=1".
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE COMMAND…")
	}
	err := ts.Exec(args[1], args[2:]...)
	code := "0"
	if err != nil {
		code = exitText(err)
	}
	if code != args[0] {
		ts.Fatalf("exit code %s, want %s (%v)", code, args[0], err)
	}
}

// patience bounds the wait for another process.
const patience = 30 * time.Second

// until runs a command again and again until it succeeds and says a text: "until alone ftvmm pair status db".
func until(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: until TEXT COMMAND…")
	}
	for start := time.Now(); time.Since(start) < patience; {
		if ts.Exec(args[1], args[2:]...) == nil && strings.Contains(ts.ReadFile("stdout"), args[0]) {
			return
		}
	}
	ts.Fatalf("it does not say %q", args[0])
}

// waitFor waits until a file exists and contains a text.
func waitFor(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 2 {
		ts.Fatalf("usage: waitfor FILE TEXT")
	}
	for start := time.Now(); time.Since(start) < patience; {
		b, err := os.ReadFile(ts.MkAbs(args[0]))
		if err == nil && bytes.Contains(b, []byte(args[1])) {
			return
		}
		time.Sleep(5 * time.Millisecond) // between two looks at a file that another process writes
	}
	ts.Fatalf("%s does not contain %q", args[0], args[1])
}

func exitText(err error) string {
	var e *exec.ExitError
	if errors.As(err, &e) {
		return strconv.Itoa(e.ExitCode())
	}
	return err.Error()
}
