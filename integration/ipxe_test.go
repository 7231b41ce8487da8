//go:build slow

package integration

import (
	"errors"
	"fmt"
	"hash/fnv"
	"net"
	"net/http"
	"net/netip"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"

	"github.com/insomniacslk/dhcp/dhcpv4"
	"github.com/insomniacslk/dhcp/dhcpv4/server4"
	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/mirror/nic/user"
	"github.com/ftvmm/ftvmm/mirror/nic/user/tftp"
	"github.com/ftvmm/ftvmm/vmm"
)

const (
	// ipxeROM is what Debian's package ipxe-qemu has for a virtio network card.
	ipxeROM = "/usr/lib/ipxe/qemu/pxe-virtio.rom"
	// ipxePatience is for hosts that emulate firmware, where iPXE unpacks itself for a minute.
	ipxePatience = 20 * time.Minute

	bootScript = "script.ipxe"
	bootData   = 100_000 // bytes that are loaded beside the kernel
)

// bootFiles are what a guest boots: a script in a directory for TFTP, and, over HTTP, a
// multiboot kernel and data whose checksum the kernel prints.
type bootFiles struct {
	dir  string
	data []byte
	mux  *http.ServeMux
	gets atomic.Int32 // HTTP requests that were answered
}

func newBootFiles(t *testing.T) *bootFiles {
	f := &bootFiles{dir: t.TempDir(), data: pattern(bootData, 42), mux: http.NewServeMux()}
	kernel, err := guests.Image("hello-mb")
	require.NoError(t, err)
	for path, content := range map[string][]byte{"/kernel": kernel, "/data": f.data} {
		f.mux.HandleFunc("GET "+path, func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Length", fmt.Sprint(len(content)))
			if _, err := w.Write(content); err == nil {
				f.gets.Add(1)
			}
		})
	}
	return f
}

// script writes the script, for a guest that reaches the HTTP server at an address.
func (f *bootFiles) script(t *testing.T, server string) {
	text := fmt.Sprintf(`#!ipxe
echo the script runs on ${net0/ip}
kernel http://%[1]s/kernel ip=${net0/ip} mac=${net0/mac} || goto failed
module http://%[1]s/data || goto failed
boot
:failed
echo failed: ${errno}
poweroff
`, server)
	require.NoError(t, os.WriteFile(filepath.Join(f.dir, bootScript), []byte(text), 0o644))
}

// serveHTTP serves the files on a listener until the test ends.
func (f *bootFiles) serveHTTP(t *testing.T, l net.Listener) {
	s := &http.Server{Handler: f.mux, ReadHeaderTimeout: patience}
	ended := make(chan error, 1)
	go func() { ended <- s.Serve(l) }()
	t.Cleanup(func() {
		require.NoError(t, s.Close())
		require.ErrorIs(t, <-ended, http.ErrServerClosed)
	})
}

// requireNetworkBoot boots from the card's option ROM and checks that all files have arrived in the
// guest.
func (f *bootFiles) requireNetworkBoot(t *testing.T, nic vmm.NIC, guestIP string) {
	path, err := firmware.FindSeaBIOS()
	if err != nil {
		t.Skip(err)
	}
	bios, err := firmware.ReadImage(path)
	require.NoError(t, err)
	nic.ROM, err = os.ReadFile(ipxeROM)
	if errors.Is(err, os.ErrNotExist) {
		t.Skip("no iPXE for virtio network cards: apt-get install ipxe-qemu")
	}
	require.NoError(t, err)
	nic.BootIndex = 1
	began := time.Now()
	m := start(t, vmm.Config{Memory: 64 << 20, Firmware: bios, NICs: []vmm.NIC{nic}})
	at := 0
	for _, text := range []string{
		"iPXE initialising devices...ok",
		"Filename: " + bootScript,
		"the script runs on " + guestIP,
		"hello from ring 3",
	} {
		at = m.console.waitFor(t, at, text, ipxePatience)
		t.Logf("%6.1f s: %s", time.Since(began).Seconds(), text)
	}
	require.Equal(t, vmm.Exit{Reason: vmm.ExitDebugExit}, m.wait(t), "%s", m.console)
	sum := fnv.New64a()
	sum.Write(f.data)
	out := m.console.String()
	require.Contains(t, out, "ip="+guestIP+" mac="+net.HardwareAddr(nic.MAC[:]).String())
	require.Contains(t, out, "ok loader multiboot")
	require.Contains(t, out, fmt.Sprintf("module: %d bytes, sum %016x", len(f.data), sum.Sum64()))
	require.EqualValues(t, 2, f.gets.Load())
}

// iPXE, in the card's ROM, gets an address from the user network's DHCP, a script from its TFTP
// server, and a kernel with a module from a web server on the host's loopback.
func TestIPXEBootsFromTheUserNetwork(t *testing.T) {
	for _, modern := range []bool{false, true} {
		t.Run(fmt.Sprintf("modern=%v", modern), func(t *testing.T) {
			f := newBootFiles(t)
			l, err := net.Listen("tcp4", "127.0.0.1:0")
			require.NoError(t, err)
			f.serveHTTP(t, l)
			f.script(t, fmt.Sprintf("10.0.2.2:%d", l.Addr().(*net.TCPAddr).Port))
			n, err := user.New(user.Config{TFTP: f.dir, BootFile: bootScript})
			require.NoError(t, err)
			t.Cleanup(func() { require.NoError(t, n.Close()) })
			f.requireNetworkBoot(t, vmm.NIC{Backend: n, MAC: guestMAC, Modern: modern}, "10.0.2.15")
		})
	}
}

// The same over a tap, with the servers in its network namespace.
func TestIPXEBootsFromATap(t *testing.T) {
	sp := newSpace(t)
	n := sp.tap(true)
	f := newBootFiles(t)

	var web net.Listener
	var files net.PacketConn
	var dhcp *server4.Server
	require.NoError(t, sp.enter(func() (err error) {
		if web, err = net.Listen("tcp4", spaceHost+":0"); err != nil {
			return err
		}
		if files, err = net.ListenPacket("udp4", spaceHost+":69"); err != nil {
			return err
		}
		dhcp, err = server4.NewServer(spaceTap, &net.UDPAddr{Port: dhcpv4.ServerPort}, answerDHCP(t))
		return err
	}))
	f.serveHTTP(t, web)
	f.script(t, web.Addr().String())

	root, err := os.OpenRoot(f.dir)
	require.NoError(t, err)
	s := tftp.Server{Root: root, MaxBlock: 1468, Dial: func(client netip.AddrPort) (net.Conn, error) {
		return sp.dial(t.Context(), "udp4", client.String())
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
	f.requireNetworkBoot(t, vmm.NIC{Backend: n, MAC: guestMAC}, spaceGuest)
}

// answerDHCP gives the guest its address and the name of the script.
func answerDHCP(t *testing.T) server4.Handler {
	return func(c net.PacketConn, _ net.Addr, m *dhcpv4.DHCPv4) {
		kind := dhcpv4.MessageTypeOffer
		if m.MessageType() == dhcpv4.MessageTypeRequest {
			kind = dhcpv4.MessageTypeAck
		}
		host := net.ParseIP(spaceHost).To4()
		r, err := dhcpv4.NewReplyFromRequest(m,
			dhcpv4.WithMessageType(kind),
			dhcpv4.WithYourIP(net.ParseIP(spaceGuest).To4()),
			dhcpv4.WithServerIP(host),
			dhcpv4.WithNetmask(net.CIDRMask(24, 32)),
			dhcpv4.WithLeaseTime(3600),
			dhcpv4.WithOption(dhcpv4.OptServerIdentifier(host)),
			func(r *dhcpv4.DHCPv4) { r.BootFileName = bootScript },
		)
		if err == nil {
			_, err = c.WriteTo(r.ToBytes(), &net.UDPAddr{IP: net.IPv4bcast, Port: dhcpv4.ClientPort})
		}
		if err != nil {
			t.Errorf("answer %v: %v", m.MessageType(), err)
		}
	}
}
