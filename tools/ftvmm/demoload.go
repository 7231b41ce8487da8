package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"sync/atomic"
	"time"

	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/integration/twins"
)

// Of the demo's clients.
const (
	demoPort = 7000 // the ledger's, in the guest
	// repeatAfter is when a client on a user network sends a request again; one on a tap waits for its connection.
	repeatAfter = 250 * time.Millisecond
	// resumed is how many answers a client must have got before it counts as served again.
	resumed = 10
)

// clients transfer money until they are stopped, and note how long they wait.
type clients struct {
	all    []*client
	acked  atomic.Int64
	cancel context.CancelFunc
	wg     sync.WaitGroup
}

// client makes one transaction after the other over one connection.
type client struct {
	*ledger.Client
	transport string

	mu      sync.Mutex
	answers []ledger.Answer
	last    time.Time     // of the newest answer
	gap     time.Duration // the longest time between two answers since it was last taken
	err     error
}

// startClients starts n clients. If the guest's connections die with its host they connect again and repeat what was
// not answered, and every second one uses UDP.
func startClients(ctx context.Context, t *twins.Twins, n int, user bool) *clients {
	ctx, cancel := context.WithCancel(ctx)
	all := &clients{cancel: cancel}
	for i := range n {
		c := &client{transport: "tcp", last: time.Now()}
		if user && i%2 == 1 {
			c.transport = "udp"
		}
		c.Client = ledger.NewClient(uint32(1+i), func(ctx context.Context) (net.Conn, error) {
			conn, err := t.Dial(ctx, c.transport, demoPort)
			if err == nil && c.transport == "udp" {
				conn = impatient{conn}
			}
			return conn, err
		})
		c.Timeout = 0
		if user {
			c.Timeout = repeatAfter
		}
		all.all = append(all.all, c)
		all.wg.Add(1)
		go func() {
			defer all.wg.Done()
			c.run(ctx, uint16(i), &all.acked)
		}()
	}
	return all
}

// impatient is a socket for datagrams that breaks when no answer comes: after a switch-over the side that it leads to is
// there and has nothing to say, and the next socket leads to the other.
type impatient struct{ net.Conn }

var errSilent = errors.New("no answer from this side")

func (c impatient) Read(p []byte) (int, error) {
	n, err := c.Conn.Read(p)
	if errors.Is(err, os.ErrDeadlineExceeded) {
		err = errSilent
	}
	return n, err
}

func (c *client) run(ctx context.Context, account uint16, acked *atomic.Int64) {
	defer c.Close()
	for n := 0; ctx.Err() == nil; n++ {
		var got ledger.Answer
		var err error
		if n%2 == 0 {
			got, err = c.Deposit(ctx, account, 100)
		} else {
			got, err = c.Transfer(ctx, account, (account+1)%ledger.Accounts, 50)
		}
		now := time.Now()
		c.mu.Lock()
		if err != nil {
			if ctx.Err() == nil {
				c.err = fmt.Errorf("client %d: %w", account+1, err)
			}
			c.mu.Unlock()
			return
		}
		c.answers = append(c.answers, got)
		c.gap, c.last = max(c.gap, now.Sub(c.last)), now
		c.mu.Unlock()
		acked.Add(1)
	}
}

// progress returns how many answers the client has got.
func (c *client) progress() (int, error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.answers), c.err
}

// mark begins to look for the longest gaps anew.
func (all *clients) mark() {
	for _, c := range all.all {
		c.mu.Lock()
		c.gap = 0
		c.mu.Unlock()
	}
}

// served waits until each client has been answered again some times, and returns the longest gap that each has
// seen since mark.
func (all *clients) served(ctx context.Context) (gaps []time.Duration, err error) {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	for i, c := range all.all {
		before, err := c.progress()
		for n := before; err == nil && n < before+resumed; n, err = c.progress() {
			if sleep(ctx, time.Millisecond) != nil {
				err = fmt.Errorf("client %d is not answered: %w", i+1, ctx.Err())
				break
			}
		}
		if err != nil {
			return nil, err
		}
	}
	for _, c := range all.all {
		c.mu.Lock()
		gaps = append(gaps, c.gap)
		c.mu.Unlock()
	}
	return gaps, nil
}

// stop ends the clients and returns all answers that they got.
func (all *clients) stop() ([]ledger.Answer, error) {
	all.cancel()
	all.wg.Wait()
	var answers []ledger.Answer
	for _, c := range all.all {
		if c.err != nil {
			return nil, c.err
		}
		answers = append(answers, c.answers...)
	}
	return answers, nil
}
