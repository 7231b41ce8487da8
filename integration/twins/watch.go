package twins

import (
	"encoding/binary"
	"fmt"
	"net"
	"sync"

	"github.com/mdlayher/packet"
	"golang.org/x/sys/unix"
)

// Watch reads along what the guest sends over TCP, whichever side it leaves from. To the world there is one guest: a byte of a
// connection that is sent again is the same byte. Two sides that both let outputs out would soon send
// different ones under the same sequence number.
type Watch struct {
	conn *packet.Conn
	done chan struct{}

	mu        sync.Mutex
	streams   map[uint16]*stream // by the client's port
	bytes     int64
	conflicts []string
}

// stream is what the guest has sent on a connection.
type stream struct {
	first uint32 // sequence number of data[0]
	data  []byte
	known []bool
}

// maxStream bounds what is kept of a connection, in bytes.
const maxStream = 256 << 20

// Watch begins to read along. Its Close ends it.
func (t *Twins) Watch() (*Watch, error) {
	w := &Watch{done: make(chan struct{}), streams: map[uint16]*stream{}}
	err := t.Enter(func() error {
		br, err := net.InterfaceByName(Bridge)
		if err != nil {
			return err
		}
		w.conn, err = packet.Listen(br, packet.Raw, unix.ETH_P_ALL, nil)
		return err
	})
	if err != nil {
		return nil, fmt.Errorf("watch the bridge: %w", err)
	}
	go func() {
		defer close(w.done)
		buf := make([]byte, 1<<17)
		for {
			n, _, err := w.conn.ReadFrom(buf)
			if err != nil {
				return
			}
			w.frame(buf[:n])
		}
	}()
	return w, nil
}

// Offsets and values of Ethernet, IPv4 (RFC 791) and TCP (RFC 9293).
const (
	ethernetHeader = 14
	ipHeader       = 20
	tcpHeader      = 20
	protoTCP       = 6
	flagSYN        = 2
)

// frame looks at a frame.
func (w *Watch) frame(b []byte) {
	guest := net.ParseIP(GuestAddress).To4()
	if len(b) < ethernetHeader+ipHeader || binary.BigEndian.Uint16(b[12:]) != unix.ETH_P_IP {
		return
	}
	ip := b[ethernetHeader:]
	length, header := int(binary.BigEndian.Uint16(ip[2:])), int(ip[0]&15)*4
	if ip[9] != protoTCP || !guest.Equal(net.IP(ip[12:16])) || header < ipHeader || length > len(ip) || length < header+tcpHeader {
		return
	}
	tcp := ip[header:length]
	port, seq, data := binary.BigEndian.Uint16(tcp[2:]), binary.BigEndian.Uint32(tcp[4:]), int(tcp[12]>>4)*4
	if data > len(tcp) {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	s := w.streams[port]
	if tcp[13]&flagSYN != 0 {
		if s == nil || s.first != seq+1 {
			w.streams[port] = &stream{first: seq + 1}
		}
		return
	}
	if s == nil {
		s = &stream{first: seq}
		w.streams[port] = s
	}
	w.bytes += int64(len(tcp) - data)
	if at := int(int32(seq - s.first)); at >= 0 && at <= maxStream {
		if x := s.add(at, tcp[data:]); x >= 0 {
			w.conflicts = append(w.conflicts, fmt.Sprintf("to port %d: byte %d was %#x before and is %#x now", port, x, s.data[x], tcp[data+x-at]))
		}
	}
}

// add adds bytes at an offset. It returns the offset of one that was another before, or -1.
func (s *stream) add(at int, b []byte) int {
	if n := at + len(b) - len(s.data); n > 0 {
		s.data, s.known = append(s.data, make([]byte, n)...), append(s.known, make([]bool, n)...)
	}
	for i, x := range b {
		if s.known[at+i] && s.data[at+i] != x {
			return at + i
		}
		s.data[at+i], s.known[at+i] = x, true
	}
	return -1
}

// Close ends the watch. It returns how many bytes the guest has sent, and what it sent in two versions.
func (w *Watch) Close() (bytes int64, conflicts []string) {
	_ = w.conn.Close()
	<-w.done
	return w.bytes, w.conflicts
}
