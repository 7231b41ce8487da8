package main

import (
	"bytes"
	"fmt"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/selftest"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// A host on which guests cannot run is told apart by code, with a remedy.
func TestCheckWithoutKVM(t *testing.T) {
	for _, c := range []struct {
		err          error
		code, remedy string
	}{
		{kvm.ErrNoKVM, "no-kvm", "enable virtualization"},
		{kvm.ErrPermission, "kvm-permission", "join the group"},
		{kvm.ErrFeature, "kvm-feature", "newer Linux kernel"},
	} {
		f := cannotRun(fmt.Errorf("%w: /dev/kvm", c.err))
		require.Equal(t, runNoKVM, f.exit)
		require.Equal(t, c.code, f.problems[0].Code)
		require.Contains(t, f.problems[0].Remedy, c.remedy)
	}
}

// The exit code follows from the rows, unless a level was asked for that is not possible.
func TestCheckExitCode(t *testing.T) {
	answers := func(three string) []selftest.Answer {
		return []selftest.Answer{{Value: selftest.Possible}, {Value: selftest.Possible}, {Value: three}}
	}
	for _, c := range []struct {
		state selftest.State
		three string
		level int
		exit  int
	}{
		{selftest.Good, selftest.Possible, 0, exitOK},
		{selftest.Warning, selftest.Possible, 3, exitOK},
		{selftest.Unknown, selftest.NotKnown, 0, exitOK},
		{selftest.Unknown, selftest.NotKnown, 2, exitOK},
		{selftest.Unknown, selftest.NotKnown, 3, exitPrecondition},
		{selftest.Error, selftest.Possible, 0, exitFailed},
		{selftest.Error, selftest.Possible, 3, exitFailed}, // by checkpoints, but something is wrong
		{selftest.Error, selftest.Impossible, 3, exitPrecondition},
	} {
		d := checkDocument{State: c.state, Verdict: selftest.Verdict{Levels: answers(c.three)}}
		d.judge(c.level)
		require.Equal(t, c.exit, d.ExitCode, "%+v", c)
	}
}

// On a terminal one line says how far the check has come; it is gone at the end.
func TestCheckProgress(t *testing.T) {
	var out bytes.Buffer
	at := selftest.Progress{Done: 5, Total: 20, Part: 0.25, Next: "guest.blk"}
	p := progress{&out, time.Now()}
	p.show(at)
	require.Regexp(t, `^\r\x1b\[K 25%  check 6 of 20: guest\.blk, 0s, about 0s left$`, out.String())
	out.Reset()
	p.clear()
	require.Equal(t, eraseLine, out.String())
	none := (&app{err: &out}).newProgress(time.Now())
	none.show(at)
	require.Equal(t, eraseLine, out.String(), "what is no terminal gets nothing")
}
