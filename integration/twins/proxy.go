package twins

import (
	"context"
	"errors"
	"net"
	"sync"
	"time"
)

// Proxy stands between two ends of TCP connections and gives them trouble: it can hold what one end sends, all of it or from a
// certain byte on, delay it, or end the connections.
//
// What it holds it holds completely: the end of a connection does not pass either. So a held direction looks to the
// receiver like a network that has lost its way, and not like a peer that has gone. What was held goes on when it is released.
type Proxy struct {
	twins  *Twins
	listen net.Listener
	target string

	mu    sync.Mutex
	more  sync.Cond
	pass  [2]direction
	conns map[net.Conn]struct{}
	ended bool
	wg    sync.WaitGroup
}

// The ends of a proxy.
const (
	FromTarget = 0 // what the proxy connects to
	FromClient = 1 // who connects to the proxy
)

// direction is what one end sends.
type direction struct {
	held   bool
	limit  bool
	left   int64  // bytes that may pass, with limit
	spent  func() // called when they have
	delay  time.Duration
	passed int64
}

// proxyBuffer is how much passes at once, in bytes.
const proxyBuffer = 16 << 10

// Proxy begins to forward connections to an address in the pair's namespace. Close of the twins ends it.
func (t *Twins) Proxy(listen, target string) (*Proxy, error) {
	p := &Proxy{twins: t, target: target, conns: map[net.Conn]struct{}{}}
	p.more.L = &p.mu
	err := t.Enter(func() (err error) {
		p.listen, err = net.Listen("tcp", listen)
		return err
	})
	if err != nil {
		return nil, err
	}
	p.wg.Add(1)
	go p.accept()
	return p, nil
}

func (p *Proxy) accept() {
	defer p.wg.Done()
	for {
		c, err := p.listen.Accept()
		if err != nil {
			return
		}
		p.wg.Add(1)
		go func() {
			defer p.wg.Done()
			p.forward(c)
		}()
	}
}

// forward connects a client to the target until either has ended.
func (p *Proxy) forward(client net.Conn) {
	defer client.Close()
	var target net.Conn
	err := p.twins.Enter(func() (err error) {
		var d net.Dialer
		ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
		defer cancel()
		target, err = d.DialContext(ctx, "tcp", p.target)
		return err
	})
	if err != nil {
		return
	}
	defer target.Close()
	p.mu.Lock()
	if p.ended {
		p.mu.Unlock()
		return
	}
	p.conns[client], p.conns[target] = struct{}{}, struct{}{}
	p.mu.Unlock()
	done := make(chan struct{}, 2)
	for _, x := range []struct {
		way  int
		from net.Conn
		to   net.Conn
	}{{FromTarget, target, client}, {FromClient, client, target}} {
		go func() {
			p.pump(x.way, x.from, x.to)
			done <- struct{}{}
		}()
	}
	<-done // once one direction has ended and may say so, both do, as with a process that dies
	client.Close()
	target.Close()
	<-done
	p.mu.Lock()
	delete(p.conns, client)
	delete(p.conns, target)
	p.mu.Unlock()
}

// pump forwards one direction of a connection.
func (p *Proxy) pump(way int, from, to net.Conn) {
	buf := make([]byte, proxyBuffer)
	for {
		n, err := from.Read(buf)
		for b := buf[:n]; len(b) > 0; {
			k, delay, ok := p.allow(way, len(b))
			if !ok {
				return
			}
			if delay > 0 {
				time.Sleep(delay)
			}
			if _, err := to.Write(b[:k]); err != nil {
				return
			}
			b = b[k:]
			p.spend(way)
		}
		if err != nil {
			p.allow(way, 0)
			return
		}
	}
}

// allow waits until something may pass, and returns how much of n. With 0 it waits until the end of the connection may.
func (p *Proxy) allow(way, n int) (int, time.Duration, bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	d := &p.pass[way]
	for !p.ended && (d.held || d.limit && d.left == 0) {
		p.more.Wait()
	}
	if d.limit {
		n = int(min(int64(n), d.left))
		d.left -= int64(n)
	}
	d.passed += int64(n)
	return n, d.delay, !p.ended
}

// spend tells who waits for it that the last byte that may pass has.
func (p *Proxy) spend(way int) {
	p.mu.Lock()
	var f func()
	if d := &p.pass[way]; d.limit && d.left == 0 {
		f, d.spent = d.spent, nil
	}
	p.mu.Unlock()
	if f != nil {
		f()
	}
}

// change changes a direction.
func (p *Proxy) change(way int, f func(d *direction)) {
	p.mu.Lock()
	defer p.mu.Unlock()
	f(&p.pass[way])
	p.more.Broadcast()
}

// Hold lets nothing pass that an end sends.
func (p *Proxy) Hold(way int) { p.change(way, func(d *direction) { d.held = true }) }

// HoldAfter lets n more bytes pass that an end sends, calls then, and holds the rest.
func (p *Proxy) HoldAfter(way int, n int64, then func()) {
	p.change(way, func(d *direction) { d.limit, d.left, d.spent = true, n, then })
}

// Delay makes each piece of what an end sends late.
func (p *Proxy) Delay(way int, by time.Duration) { p.change(way, func(d *direction) { d.delay = by }) }

// Passed returns how many bytes of an end have passed.
func (p *Proxy) Passed(way int) int64 {
	p.mu.Lock()
	defer p.mu.Unlock()
	return p.pass[way].passed
}

// Release lets everything pass again, also what was held.
func (p *Proxy) Release() {
	for way := range p.pass {
		p.change(way, func(d *direction) { *d = direction{passed: d.passed} })
	}
}

// Break ends all connections.
func (p *Proxy) Break() {
	p.mu.Lock()
	defer p.mu.Unlock()
	for c := range p.conns {
		c.Close()
	}
	p.more.Broadcast()
}

// Close ends the proxy and its connections.
func (p *Proxy) Close() error {
	p.mu.Lock()
	p.ended = true
	p.mu.Unlock()
	err := p.listen.Close()
	p.Break()
	p.wg.Wait()
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}
