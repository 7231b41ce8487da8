package main

import (
	"context"
	"errors"
	"fmt"
	"net/http"
	"os"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/lockstep/arbiter"
	"github.com/ftvmm/ftvmm/lockstep/link"
	"github.com/ftvmm/ftvmm/mirror"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/config"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// The exit codes of all commands but run.
const (
	exitOK           = 0
	exitFailed       = 1
	exitUsage        = 2 // usage or configuration
	exitNotFound     = 3
	exitConflict     = 4 // wrong state
	exitNotPermitted = 5
	exitUnreachable  = 6
	exitTimeout      = 7 // the wait ended, the work goes on
	exitUnsafe       = 9 // refused: the guest could split in two, or lose what it promised
	exitVersionSkew  = 12
	exitUnsupported  = 13
	exitInternal     = 14
)

// The exit codes of run, which are those of a guest's VMM.
const (
	runPoweredOff = 0
	runGuestCode  = 32 // plus the guest's code, 0 to maxGuestCode
	runBadConfig  = 64
	runNoKVM      = 65 // or KVM lacks a feature
	runCrash      = 66 // triple fault, emulation failure
	runArbiter    = 67 // lost the arbiter: stopped so that the peer goes on
	runDivergence = 68 // a divergence that could not be repaired
	runWatchdog   = 69

	// maxGuestCode is the largest code of a guest that an exit code can carry; larger ones are reported as this one.
	maxGuestCode = 31
)

// problem is one error as a user sees it.
type problem struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Remedy  string `json:"remedy,omitempty"`
}

// failure is an error of a command: what to print, and the exit code.
type failure struct {
	exit     int
	problems []problem
}

func (f *failure) Error() string {
	text := f.problems[0].Message
	for _, p := range f.problems[1:] {
		text += "\n" + p.Message
	}
	return text
}

func fail(exit int, code, remedy, format string, args ...any) *failure {
	return &failure{exit, []problem{{code, fmt.Sprintf(format, args...), remedy}}}
}

// classify finds the problems and the exit code in any error.
func classify(err error) *failure {
	var (
		f        *failure
		conf     config.Errors
		ctl      *control.Error
		mir      *mirror.Error
		arb      *arbiter.Error
		lnk      *link.Error
		firm     *firmware.Error
		withCode = func(exit int, code, remedy string) *failure {
			return fail(exit, code, remedy, "%v", err)
		}
	)
	switch {
	case errors.As(err, &f):
		return f
	case errors.As(err, &conf):
		f = &failure{exit: exitUsage}
		for _, e := range conf {
			f.problems = append(f.problems, problem{string(e.Code), e.Error(), e.Remedy})
		}
		return f
	case errors.As(err, &ctl):
		return withCode(controlExit(ctl.Status), ctl.Code, ctl.Remedy)
	case errors.As(err, &arb):
		if errors.As(arbiterFailure(err), &f) {
			return f
		}
	case errors.As(err, &lnk):
		if errors.As(pairFailure(err), &f) {
			return f
		}
	case errors.As(err, &mir):
		return withCode(exitFailed, mir.Reason, mir.Remedy)
	case errors.As(err, &firm):
		f = fail(exitFailed, firm.Code, firm.Remedy, "%s", firm.Problem)
		if firm.Err != nil {
			f.problems[0].Message += ": " + firm.Err.Error()
		}
		return f
	case errors.Is(err, kvm.ErrPermission):
		return withCode(exitNotPermitted, "kvm-permission", "run as root, or join the group that owns the device (often kvm)")
	case errors.Is(err, kvm.ErrNoKVM):
		return withCode(exitUnsupported, "no-kvm", "enable virtualization in the host's firmware and load kvm_intel or kvm_amd; in a VM, enable nested virtualization")
	case errors.Is(err, kvm.ErrFeature):
		return withCode(exitUnsupported, "kvm-feature", "use a newer Linux kernel on the host")
	case errors.Is(err, console.ErrInUse):
		return withCode(exitConflict, "already-running", "a guest of this name runs already: choose another --name or --control")
	case errors.Is(err, vmm.ErrEnded):
		return withCode(exitConflict, control.CodeEnded, "start it again with ftvmm run")
	case errors.Is(err, context.DeadlineExceeded):
		return fail(exitTimeout, "timeout", "the guest may still carry it out: look with ftvmm vm status, or wait longer with --timeout", "no answer within the time allowed")
	case errors.Is(err, context.Canceled):
		return fail(exitFailed, "interrupted", "", "interrupted")
	case errors.Is(err, os.ErrPermission):
		return withCode(exitNotPermitted, "no-permission", "change the permissions, or use another user")
	}
	return withCode(exitFailed, "failed", "")
}

// controlExit maps a refusal of the control socket to an exit code.
func controlExit(status int) int {
	switch status {
	case http.StatusBadRequest, http.StatusMethodNotAllowed, http.StatusRequestEntityTooLarge:
		return exitUsage
	case http.StatusNotFound:
		return exitNotFound
	case http.StatusConflict:
		return exitConflict
	case http.StatusForbidden:
		return exitNotPermitted
	case http.StatusBadGateway:
		return exitUnreachable
	}
	return exitFailed
}

// runExit maps a failure before the guest ran to run's own exit codes.
func runExit(err error) int {
	switch {
	case errors.Is(err, kvm.ErrNoKVM), errors.Is(err, kvm.ErrPermission), errors.Is(err, kvm.ErrFeature):
		return runNoKVM
	}
	return runBadConfig
}

// guestExit maps the end of a guest to run's exit code.
func guestExit(e vmm.Exit) int {
	switch e.Reason {
	case vmm.ExitPowerOff:
		return runPoweredOff
	case vmm.ExitDebugExit:
		return runGuestCode + int(min(e.Code, maxGuestCode))
	case vmm.ExitCrash:
		return runCrash
	}
	return exitFailed // ended by the user
}
