//go:build slow

package integration

import (
	"context"
	"os"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/vmm"
)

// consoleOf returns what a side's guest has written.
func consoleOf(t *testing.T, p *twins.Twins, side int) string {
	b, err := os.ReadFile(p.Console(side))
	if err != nil {
		return ""
	}
	return string(b)
}

// waitConsole waits until a side's guest has written something.
func waitConsole(t *testing.T, p *twins.Twins, side int, text string) {
	t.Helper()
	require.Eventually(t, func() bool { return strings.Contains(consoleOf(t, p, side), text) }, ipxePatience, 50*time.Millisecond,
		"side %s does not say %q", twins.Sides[side], text)
}

// SeaBIOS, in the middle of its work, goes on where it was when its host is lost, and nothing of what it writes is
// missing.
func TestFirmwareSurvivesTheLossOfItsHost(t *testing.T) {
	path, err := firmware.FindSeaBIOS()
	if err != nil {
		t.Skip(err)
	}
	bios, err := firmware.ReadImage(path)
	require.NoError(t, err)
	const end = "No bootable device."
	alone := start(t, vmm.Config{Name: "twin", Memory: 64 << 20, Firmware: bios})
	alone.console.waitFor(t, 0, end, ipxePatience)
	want := alone.console.String()
	alone.Quit() // it would wait in a loop, and so slow down the others
	alone.wait(t)
	want = want[:strings.Index(want, end)+len(end)]

	ctx, cancel := context.WithTimeout(context.Background(), ipxePatience)
	defer cancel()
	p := newTwins(t, twins.Options{NoNIC: true, Flags: []string{"--firmware", "seabios"}})
	primary := startTwins(t, ctx, p)
	waitConsole(t, p, primary, "SeaBIOS (version")
	p.Sides[primary].Kill()
	waitConsole(t, p, 1-primary, end)
	first, second := consoleOf(t, p, primary), consoleOf(t, p, 1-primary)
	second = second[:strings.Index(second, end)+len(end)]
	// The last of what one side wrote may come from the other again; nothing may be missing. The reference has no UUID.
	uuid := regexp.MustCompile(`Machine UUID [0-9a-f-]+\r\n`)
	whole := false
	for k := 0; k <= len(second) && !whole; k++ {
		whole = uuid.ReplaceAllString(first+second[k:], "") == uuid.ReplaceAllString(want, "")
	}
	require.True(t, whole, "%q and %q do not make %q", first, second, want)
	require.Zero(t, p.Sides[1-primary].Count("pair-divergence"))
}
