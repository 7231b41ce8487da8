//go:build slow

package integration

import (
	"context"
	"fmt"
	"hash/fnv"
	"net"
	"net/http"
	"net/netip"
	"os"
	"regexp"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/integration/twins"
	"github.com/ftvmm/ftvmm/mirror/nic/user/tftp"
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

// iPXE goes on with a download when its host is lost in the middle, and what arrives has the right checksum. It reads
// clocks that cannot be trapped here, so each of its outputs is covered by a cut.
func TestNetworkBootSurvivesTheLossOfItsHost(t *testing.T) {
	if _, err := os.Stat(ipxeROM); err != nil {
		t.Skip("no iPXE for virtio network cards: apt-get install ipxe-qemu")
	}
	ctx, cancel := context.WithTimeout(context.Background(), ipxePatience)
	defer cancel()
	p := newTwins(t, twins.Options{
		NIC: ",rom=" + ipxeROM + ",bootindex=1", Flags: []string{"--firmware", "seabios", "--guest-tsc", "auto"},
	})
	f := newBootFiles(t)
	half, killed := make(chan struct{}), make(chan struct{})
	var once sync.Once
	f.mux.HandleFunc("GET /slow", func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Length", fmt.Sprint(len(f.data)))
		_, _ = w.Write(f.data[:len(f.data)/2])
		w.(http.Flusher).Flush()
		once.Do(func() { close(half) })
		<-killed
		if _, err := w.Write(f.data[len(f.data)/2:]); err == nil {
			f.gets.Add(1)
		}
	})
	var web net.Listener
	var files net.PacketConn
	var dhcp *server4.Server
	require.NoError(t, p.Enter(func() (err error) {
		if web, err = net.Listen("tcp4", twins.HostAddress+":0"); err != nil {
			return err
		}
		if files, err = net.ListenPacket("udp4", twins.HostAddress+":69"); err != nil {
			return err
		}
		dhcp, err = server4.NewServer(twins.Bridge, &net.UDPAddr{Port: dhcpv4.ServerPort}, answerDHCP(t))
		return err
	}))
	f.serveHTTP(t, web)
	f.script(t, web.Addr().String())
	script, err := os.ReadFile(f.dir + "/" + bootScript)
	require.NoError(t, err)
	require.NoError(t, os.WriteFile(f.dir+"/"+bootScript, []byte(strings.Replace(string(script), "/data", "/slow", 1)), 0o644))
	root, err := os.OpenRoot(f.dir)
	require.NoError(t, err)
	s := tftp.Server{Root: root, MaxBlock: 1468, Dial: func(client netip.AddrPort) (c net.Conn, err error) {
		err = p.Enter(func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, "udp4", client.String())
			return err
		})
		return c, err
	}}
	ended := make(chan error, 2)
	go func() { ended <- s.Serve(files) }()
	go func() { ended <- dhcp.Serve() }()
	t.Cleanup(func() {
		files.Close()
		dhcp.Close()
		for range cap(ended) {
			require.ErrorIs(t, <-ended, net.ErrClosed)
		}
		require.NoError(t, root.Close())
	})
	primary := startTwins(t, ctx, p)
	began := time.Now()
	select {
	case <-half:
	case <-ctx.Done():
		t.Fatalf("iPXE does not ask for the file; its host: %s", consoleOf(t, p, primary))
	}
	t.Logf("half of the file is on its way after %v", time.Since(began))
	p.Sides[primary].Kill()
	close(killed)
	sum := fnv.New64a()
	sum.Write(f.data)
	waitConsole(t, p, 1-primary, fmt.Sprintf("module: %d bytes, sum %016x", len(f.data), sum.Sum64()))
	t.Logf("the kernel has it after %v", time.Since(began))
	code, err := p.Sides[1-primary].Wait(ctx)
	require.NoError(t, err)
	require.Equal(t, 32, code)
}
