package main

import (
	"bufio"
	"os"
	"os/exec"
	"strings"
	"testing"

	"github.com/creack/pty"
	"github.com/stretchr/testify/require"
	"golang.org/x/sys/unix"

	"github.com/ftvmm/ftvmm/vmm/config"
)

// On a terminal every key but Ctrl-] reaches the guest, and the terminal is as before at the end.
func TestTerminal(t *testing.T) {
	if unix.Access(config.Default().KVM, unix.R_OK|unix.W_OK) != nil {
		t.Skipf("this host has no usable %s", config.Default().KVM)
	}
	self, err := os.Executable()
	require.NoError(t, err)
	master, slave, err := pty.Open()
	require.NoError(t, err)
	defer master.Close()
	before, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)

	// Under the name "ftvmm" the test binary is the command, see TestMain.
	cmd := exec.Command(self)
	cmd.Args = []string{"ftvmm", "run", "--guest=acpi", "--append=wait=power off"}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = slave, slave, slave
	cmd.SysProcAttr = &unix.SysProcAttr{Setsid: true, Setctty: true}
	require.NoError(t, cmd.Start())
	lines := bufio.NewReader(master)
	waitFor := func(text string) {
		t.Helper()
		for {
			line, err := lines.ReadString('\n')
			require.NoError(t, err)
			if strings.Contains(line, text) {
				return
			}
		}
	}
	waitFor("waiting for the power button")
	during, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.Zero(t, during.Lflag&(unix.ICANON|unix.ECHO|unix.ISIG), "raw mode")
	_, err = master.WriteString("\x03\x1d?") // Ctrl-C is a key like others
	require.NoError(t, err)
	waitFor("Ctrl-] q ends the guest")
	_, err = master.WriteString("\x1dp")
	require.NoError(t, err)
	require.NoError(t, cmd.Wait(), "the guest powered off")
	after, err := unix.IoctlGetTermios(int(slave.Fd()), unix.TCGETS)
	require.NoError(t, err)
	require.Equal(t, before, after)
	require.NoError(t, slave.Close())
}
