package user

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"net"
	"net/netip"
	"os"
	"path"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"gvisor.dev/gvisor/pkg/tcpip/adapters/gonet"
	"gvisor.dev/gvisor/pkg/tcpip/network/ipv4"
)

// TFTP opcodes and error codes (RFC 1350, 5; RFC 2347).
const (
	tftpRRQ   = 1
	tftpWRQ   = 2
	tftpData  = 3
	tftpAck   = 4
	tftpError = 5
	tftpOAck  = 6

	tftpErrUndefined = 0
	tftpErrNotFound  = 1
	tftpErrAccess    = 2
	tftpErrIllegal   = 4
)

const (
	tftpHeader       = 4   // bytes before the data of a DATA packet
	tftpBlock        = 512 // bytes of data without the option
	tftpMinBlock     = 8   // RFC 2348
	tftpMaxBlock     = 65464
	tftpMaxRequest   = 512 // bytes (RFC 2347)
	tftpMaxTransfers = 16
	tftpTimeout      = time.Second // unless the client asks for another (RFC 2349)
	tftpMaxTimeout   = 255         // seconds
	tftpRetries      = 5
	udpIPHeaders     = 28 // bytes of IPv4 and UDP headers
)

// tftpRequest is a read request.
type tftpRequest struct {
	name    string
	mode    string
	options []tftpOption // in the client's order, names in lower case
}

type tftpOption struct{ name, value string }

// parseTFTPRequest reads the request after its opcode: strings that end in NUL.
func parseTFTPRequest(b []byte) (tftpRequest, bool) {
	if len(b) == 0 || len(b) > tftpMaxRequest || b[len(b)-1] != 0 {
		return tftpRequest{}, false
	}
	words := strings.Split(string(b[:len(b)-1]), "\x00")
	if len(words) < 2 || len(words)%2 != 0 || words[0] == "" {
		return tftpRequest{}, false
	}
	r := tftpRequest{name: words[0], mode: strings.ToLower(words[1])}
	for i := 2; i < len(words); i += 2 {
		r.options = append(r.options, tftpOption{strings.ToLower(words[i]), words[i+1]})
	}
	return r, true
}

// tftpParams are what the options settle.
type tftpParams struct {
	block   int // bytes
	timeout time.Duration
	oack    []byte // the packet that grants options; nil if none is granted
}

// negotiate grants the options that we know (RFC 2348, 2349). Others are passed over, as
// RFC 2347 demands.
func (r *tftpRequest) negotiate(size int64, maxBlock int) tftpParams {
	p := tftpParams{block: min(tftpBlock, maxBlock), timeout: tftpTimeout}
	seen := map[string]bool{}
	grant := func(name, value string) {
		if p.oack == nil {
			p.oack = binary.BigEndian.AppendUint16(nil, tftpOAck)
		}
		p.oack = append(append(p.oack, name...), 0)
		p.oack = append(append(p.oack, value...), 0)
	}
	for _, o := range r.options {
		if seen[o.name] {
			continue
		}
		seen[o.name] = true
		v, err := strconv.ParseUint(o.value, 10, 63)
		if err != nil {
			continue
		}
		switch o.name {
		case "blksize":
			if v >= tftpMinBlock {
				// No larger than a packet: network boot code often cannot reassemble.
				p.block = int(min(v, tftpMaxBlock, uint64(maxBlock)))
				grant(o.name, strconv.Itoa(p.block))
			}
		case "tsize":
			grant(o.name, strconv.FormatInt(size, 10))
		case "timeout":
			if v >= 1 && v <= tftpMaxTimeout {
				p.timeout = time.Duration(v) * time.Second
				grant(o.name, o.value)
			}
		}
	}
	return p
}

// serveTFTP reads requests until Close. A transfer has a socket and a goroutine of its own.
func (n *Network) serveTFTP(c *gonet.UDPConn) {
	var mu sync.Mutex
	active := map[netip.AddrPort]bool{} // by client, so that a repeated request begins nothing new
	buf := make([]byte, copySize)
	for {
		k, from, err := c.ReadFrom(buf)
		if err != nil {
			return
		}
		addr, ok := from.(*net.UDPAddr)
		if !ok || k < 2 {
			continue
		}
		peer := addr.AddrPort()
		op, request := binary.BigEndian.Uint16(buf), buf[2:k]
		if op != tftpRRQ {
			if op == tftpWRQ {
				_, _ = c.WriteTo(tftpErrorPacket(tftpErrAccess, "this server is read-only"), from)
			}
			continue // anything else belongs to no transfer, and errors are not answered
		}
		r, ok := parseTFTPRequest(request)
		if !ok {
			_, _ = c.WriteTo(tftpErrorPacket(tftpErrIllegal, "malformed request"), from)
			continue
		}
		mu.Lock()
		busy := active[peer] || len(active) >= tftpMaxTransfers
		if !busy {
			active[peer] = true
		}
		mu.Unlock()
		if busy {
			continue // the client asks again
		}
		if !n.spawn(func() {
			defer func() {
				mu.Lock()
				delete(active, peer)
				mu.Unlock()
			}()
			local, remote := n.stackAddr(netip.AddrPortFrom(n.gateway, 0)), n.stackAddr(peer)
			t, err := gonet.DialUDP(n.stack, &local, &remote, ipv4.ProtocolNumber)
			if err != nil || !n.track(t) {
				return
			}
			defer n.release(t)
			sendFile(t, n.tftpRoot, r, n.config.MTU-udpIPHeaders-tftpHeader)
		}) {
			return
		}
	}
}

func tftpErrorPacket(code uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, tftpError)
	b = binary.BigEndian.AppendUint16(b, code)
	return append(append(b, text...), 0)
}

// openTFTP opens a file below root for a client's name of it: with either slash, absolute or not.
func openTFTP(root *os.Root, name string) (*os.File, int64, error) {
	name = path.Clean("/" + strings.ReplaceAll(name, `\`, "/"))[1:]
	if name == "" {
		return nil, 0, fs.ErrNotExist
	}
	// Without blocking: opening a FIFO would wait for its writer.
	f, err := root.OpenFile(name, os.O_RDONLY|syscall.O_NONBLOCK, 0)
	if err != nil {
		return nil, 0, err
	}
	st, err := f.Stat()
	if err == nil && !st.Mode().IsRegular() {
		err = fs.ErrPermission
	}
	if err != nil {
		f.Close()
		return nil, 0, err
	}
	return f, st.Size(), nil
}

// sendFile is a transfer, from the request on; c is connected to the client.
func sendFile(c net.Conn, root *os.Root, r tftpRequest, maxBlock int) {
	refuse := func(code uint16, text string) { _, _ = c.Write(tftpErrorPacket(code, text)) }
	if r.mode != "octet" {
		refuse(tftpErrIllegal, "only mode octet is served")
		return
	}
	if maxBlock < tftpMinBlock {
		refuse(tftpErrUndefined, "the MTU is too small")
		return
	}
	f, size, err := openTFTP(root, r.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		refuse(tftpErrNotFound, "no such file")
		return
	case err != nil:
		refuse(tftpErrAccess, "the file cannot be read")
		return
	}
	defer f.Close()
	p := r.negotiate(size, maxBlock)
	if p.oack != nil && !exchange(c, p.oack, 0, p.timeout) {
		return
	}
	packet := make([]byte, tftpHeader+p.block)
	binary.BigEndian.PutUint16(packet, tftpData)
	// Block numbers start at 1 and, in a file of more than 65535 blocks, go on at 0.
	for block := uint16(1); ; block++ {
		k, err := io.ReadFull(f, packet[tftpHeader:])
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			refuse(tftpErrUndefined, "the file cannot be read")
			return
		}
		binary.BigEndian.PutUint16(packet[2:], block)
		if !exchange(c, packet[:tftpHeader+k], block, p.timeout) || k < p.block {
			return
		}
	}
}

// exchange sends a packet until its block is acknowledged; it reports false if the
// client ends the transfer or is silent.
func exchange(c net.Conn, packet []byte, block uint16, timeout time.Duration) bool {
	var answer [tftpMaxRequest]byte
	for range tftpRetries {
		if _, err := c.Write(packet); err != nil {
			return false
		}
		deadline := time.Now().Add(timeout)
		for {
			_ = c.SetReadDeadline(deadline)
			k, err := c.Read(answer[:])
			if err != nil {
				var ne net.Error
				if errors.As(err, &ne) && ne.Timeout() {
					break // send again
				}
				return false
			}
			if k < tftpHeader {
				continue
			}
			switch binary.BigEndian.Uint16(answer[:]) {
			case tftpAck:
				// An older block's acknowledgement is a duplicate: answering it would
				// double every packet from here on.
				if binary.BigEndian.Uint16(answer[2:]) == block {
					return true
				}
			case tftpError:
				return false
			}
		}
	}
	return false
}
