// Package tftp serves files by TFTP (RFC 1350), with the options blksize, tsize and timeout
// (RFC 2347 to 2349), which is what network boot firmware wants. It is read-only, and takes
// its sockets from its user: those of a host, or of a stack in this process.
package tftp

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
)

// Opcodes and error codes (RFC 1350, 5; RFC 2347).
const (
	opRead  = 1
	opWrite = 2
	opData  = 3
	opAck   = 4
	opError = 5
	opOAck  = 6

	errUndefined = 0
	errNotFound  = 1
	errAccess    = 2
	errIllegal   = 4
)

const (
	dataHeader     = 4   // bytes before the data of a DATA packet
	defaultBlock   = 512 // bytes of data without the option
	minBlock       = 8   // RFC 2348
	largestBlock   = 65464
	maxRequest     = 512 // bytes (RFC 2347)
	maxTransfers   = 16
	defaultTimeout = time.Second // unless the client asks for another (RFC 2349)
	maxTimeout     = 255         // seconds
	maxTries       = 5
)

// request is a read request.
type request struct {
	name    string
	mode    string
	options []option // in the client's order, names in lower case
}

type option struct{ name, value string }

// parseRequest reads the request after its opcode: strings that end in NUL.
func parseRequest(b []byte) (request, bool) {
	if len(b) == 0 || len(b) > maxRequest || b[len(b)-1] != 0 {
		return request{}, false
	}
	words := strings.Split(string(b[:len(b)-1]), "\x00")
	if len(words) < 2 || len(words)%2 != 0 || words[0] == "" {
		return request{}, false
	}
	r := request{name: words[0], mode: strings.ToLower(words[1])}
	for i := 2; i < len(words); i += 2 {
		r.options = append(r.options, option{strings.ToLower(words[i]), words[i+1]})
	}
	return r, true
}

// params are what the options settle.
type params struct {
	block   int // bytes
	timeout time.Duration
	oack    []byte // the packet that grants options; nil if none is granted
}

// negotiate grants the options that we know (RFC 2348, 2349). Others are passed over, as
// RFC 2347 demands.
func (r *request) negotiate(size int64, maxBlock int) params {
	p := params{block: min(defaultBlock, maxBlock), timeout: defaultTimeout}
	seen := map[string]bool{}
	grant := func(name, value string) {
		if p.oack == nil {
			p.oack = binary.BigEndian.AppendUint16(nil, opOAck)
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
			if v >= minBlock {
				// No larger than a packet: network boot code often cannot reassemble.
				p.block = int(min(v, largestBlock, uint64(maxBlock)))
				grant(o.name, strconv.Itoa(p.block))
			}
		case "tsize":
			grant(o.name, strconv.FormatInt(size, 10))
		case "timeout":
			if v >= 1 && v <= maxTimeout {
				p.timeout = time.Duration(v) * time.Second
				grant(o.name, o.value)
			}
		}
	}
	return p
}

// Server serves the files below a directory.
type Server struct {
	Root *os.Root
	// MaxBlock bounds the data of a packet in bytes: 28 for IPv4 and UDP and 4 for TFTP less
	// than the MTU, since network boot code often cannot reassemble.
	MaxBlock int
	// Dial returns a socket for a transfer, with a port of its own and connected to the
	// client; the server closes it.
	Dial func(client netip.AddrPort) (net.Conn, error)

	mu     sync.Mutex
	active map[netip.AddrPort]net.Conn // by client, so that a repeated request begins nothing new
	tasks  sync.WaitGroup
}

// Serve reads requests from c until that fails, such as by being closed; then it ends the
// transfers under way and returns the error. A transfer has a socket and a goroutine of its own.
func (s *Server) Serve(c net.PacketConn) error {
	s.active = map[netip.AddrPort]net.Conn{}
	defer func() {
		s.mu.Lock()
		for _, t := range s.active {
			t.Close()
		}
		s.mu.Unlock()
		s.tasks.Wait()
	}()
	buf := make([]byte, maxRequest+3) // one byte more than the longest, and the opcode
	for {
		k, from, err := c.ReadFrom(buf)
		if err != nil {
			return err
		}
		addr, ok := from.(*net.UDPAddr)
		if !ok || k < 2 {
			continue
		}
		switch binary.BigEndian.Uint16(buf) {
		case opRead:
			r, ok := parseRequest(buf[2:k])
			if !ok {
				_, _ = c.WriteTo(errorPacket(errIllegal, "malformed request"), from)
				continue
			}
			s.start(addr.AddrPort(), r)
		case opWrite:
			_, _ = c.WriteTo(errorPacket(errAccess, "this server is read-only"), from)
		} // anything else belongs to no transfer, and errors are not answered
	}
}

// start begins a transfer, if the client has none and there is room; else the client asks again.
func (s *Server) start(client netip.AddrPort, r request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if _, busy := s.active[client]; busy || len(s.active) >= maxTransfers {
		return
	}
	c, err := s.Dial(client)
	if err != nil {
		return
	}
	s.active[client] = c
	s.tasks.Add(1)
	go func() {
		defer s.tasks.Done()
		sendFile(c, s.Root, r, s.MaxBlock)
		s.mu.Lock()
		delete(s.active, client)
		s.mu.Unlock()
		c.Close()
	}()
}

func errorPacket(code uint16, text string) []byte {
	b := binary.BigEndian.AppendUint16(nil, opError)
	b = binary.BigEndian.AppendUint16(b, code)
	return append(append(b, text...), 0)
}

// openFile opens a file below root for a client's name of it: with either slash, absolute or not.
func openFile(root *os.Root, name string) (*os.File, int64, error) {
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
func sendFile(c net.Conn, root *os.Root, r request, maxBlock int) {
	refuse := func(code uint16, text string) { _, _ = c.Write(errorPacket(code, text)) }
	if r.mode != "octet" {
		refuse(errIllegal, "only mode octet is served")
		return
	}
	if maxBlock < minBlock {
		refuse(errUndefined, "the MTU is too small")
		return
	}
	f, size, err := openFile(root, r.name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		refuse(errNotFound, "no such file")
		return
	case err != nil:
		refuse(errAccess, "the file cannot be read")
		return
	}
	defer f.Close()
	p := r.negotiate(size, maxBlock)
	if p.oack != nil && !exchange(c, p.oack, 0, p.timeout) {
		return
	}
	packet := make([]byte, dataHeader+p.block)
	binary.BigEndian.PutUint16(packet, opData)
	// Block numbers start at 1 and, in a file of more than 65535 blocks, go on at 0.
	for block := uint16(1); ; block++ {
		k, err := io.ReadFull(f, packet[dataHeader:])
		if err != nil && !errors.Is(err, io.EOF) && !errors.Is(err, io.ErrUnexpectedEOF) {
			refuse(errUndefined, "the file cannot be read")
			return
		}
		binary.BigEndian.PutUint16(packet[2:], block)
		if !exchange(c, packet[:dataHeader+k], block, p.timeout) || k < p.block {
			return
		}
	}
}

// exchange sends a packet until its block is acknowledged; it reports false if the
// client ends the transfer or is silent.
func exchange(c net.Conn, packet []byte, block uint16, timeout time.Duration) bool {
	var answer [maxRequest]byte
	for range maxTries {
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
			if k < dataHeader {
				continue
			}
			switch binary.BigEndian.Uint16(answer[:]) {
			case opAck:
				// An older block's acknowledgement is a duplicate: answering it would
				// double every packet from here on.
				if binary.BigEndian.Uint16(answer[2:]) == block {
					return true
				}
			case opError:
				return false
			}
		}
	}
	return false
}
