package main

import (
	"context"
	"errors"
	"fmt"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/control"
)

// Errors of arbiters, of the link and of control sockets keep their stable code through all that wraps them, and most have a remedy.
func TestErrorsKeepTheirCode(t *testing.T) {
	for _, c := range []struct {
		err  error
		exit int
		code string
	}{
		{arbiter.Errorf(arbiter.NoAnswer, "look at it", "no answer"), exitUnreachable, "arbiter-unreachable"},
		{arbiter.Errorf(arbiter.BadSpec, "see help", "no arbiter"), exitUsage, "bad-arbiter"},
		{arbiter.Errorf(arbiter.KeysReadable, "chmod", "readable"), exitNotPermitted, "keys-not-protected"},
		{&link.Error{Reason: link.Unreachable, Err: errors.New("refused")}, exitUnreachable, "unreachable"},
		{&link.Error{Reason: link.WrongPair, Err: errors.New("pair x")}, exitNotPermitted, "wrong-pair"},
		{&link.Error{Reason: link.WrongVersion, ByPeer: true, Err: errors.New("2")}, exitVersionSkew, "wrong-version"},
		{&link.Error{Reason: link.KeysMissing, Err: errors.New("none")}, exitFailed, "keys-missing"},
		{&control.Error{Code: control.CodeStandby, Status: 409, Remedy: "ask the other"}, exitConflict, "standby"},
		{vmm.ErrEnded, exitConflict, control.CodeEnded},
		{context.DeadlineExceeded, exitTimeout, "timeout"},
	} {
		f := classify(fmt.Errorf("while it starts: %w", c.err))
		require.Equal(t, c.exit, f.exit, "%v", c.err)
		require.Equal(t, c.code, f.problems[0].Code)
		require.NotEmpty(t, f.problems[0].Remedy, c.code)
		require.NotEmpty(t, f.problems[0].Message)
	}
}
