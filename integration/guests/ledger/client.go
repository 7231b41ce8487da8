package ledger

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"strings"
	"time"
)

// Answer is the ledger's answer to a transaction, which is durable once it is given.
type Answer struct {
	Client  uint32
	Number  uint64
	Seq     uint64 // the record's place in the journal
	Outcome Outcome
	Balance uint64 // of the (first) account; 0 unless Outcome is OK
}

// A RefusedError is the ledger's refusal to execute a request; nothing was changed.
type RefusedError struct {
	Reason string // syntax, account, stale, clients or full
}

func (e *RefusedError) Error() string { return "ledger refuses the request: " + e.Reason }

// Client talks to a ledger over a connection that it makes anew whenever it breaks, and
// repeats a request under its number until it is answered: so each is executed exactly
// once, whatever happens to the connection, the network or the server in between.
//
// A Client has one request under way at a time and is for one goroutine. Two clients of
// one ledger need different identities, also across restarts of the test, or a first
// number beyond those used.
type Client struct {
	dial   func(context.Context) (net.Conn, error)
	id     uint32
	number uint64
	conn   net.Conn
	reader *bufio.Reader

	// Timeout is how long to wait for an answer before the request is repeated: over
	// UDP in a new datagram, over TCP on a new connection. 0 waits as long as the
	// connection lasts, which over UDP is for ever.
	Timeout time.Duration
	// Pause is the time between attempts to connect.
	Pause time.Duration
	// Connects counts the connections made, Repeats the requests sent again.
	Connects, Repeats int
}

// NewClient returns a client with the identity id, which is not 0, that connects by
// dial when it needs to. It starts with request number 1, a Timeout of a second and
// a Pause of 20 milliseconds.
func NewClient(id uint32, dial func(context.Context) (net.Conn, error)) *Client {
	return &Client{dial: dial, id: id, Timeout: time.Second, Pause: 20 * time.Millisecond}
}

// Dialer returns a dial function for NewClient that connects to an address of package
// net, such as "tcp", "10.0.2.15:7000".
func Dialer(network, address string) func(context.Context) (net.Conn, error) {
	return func(ctx context.Context) (net.Conn, error) {
		var d net.Dialer
		return d.DialContext(ctx, network, address)
	}
}

// SkipTo makes n the number of the next transaction.
func (c *Client) SkipTo(n uint64) { c.number = n - 1 }

// Close closes the connection, if there is one. The client can be used again.
func (c *Client) Close() error {
	if c.conn == nil {
		return nil
	}
	err := c.conn.Close()
	c.conn = nil
	return err
}

// Transfer moves an amount from one account to another.
func (c *Client) Transfer(ctx context.Context, from, to uint16, amount uint64) (Answer, error) {
	return c.transact(ctx, fmt.Sprintf("%d %d %d", from, to, amount), Transfer)
}

// Deposit adds an amount to an account.
func (c *Client) Deposit(ctx context.Context, account uint16, amount uint64) (Answer, error) {
	return c.transact(ctx, fmt.Sprintf("%d %d", account, amount), Deposit)
}

func (c *Client) transact(ctx context.Context, arguments string, op Op) (Answer, error) {
	c.number++
	id := fmt.Sprintf("%d.%d", c.id, c.number)
	line, err := c.do(ctx, fmt.Sprintf("%c %s %s", op, id, arguments), func(w []string) bool {
		return len(w) > 1 && w[1] == id
	})
	if err != nil {
		return Answer{}, err
	}
	return parseAnswer(line)
}

// parseAnswer parses the ledger's answer to a transaction.
func parseAnswer(line string) (Answer, error) {
	var a Answer
	var word, rest string
	if n, _ := fmt.Sscanf(line, "%s %d.%d %d %s", &word, &a.Client, &a.Number, &a.Seq, &rest); n != 5 || a.Seq == 0 {
		return Answer{}, fmt.Errorf("ledger answers %q", line)
	}
	switch {
	case word == "OK":
		if _, err := fmt.Sscanf(rest, "%d", &a.Balance); err == nil {
			return a, nil
		}
	case word == "NO" && rest == Funds.String():
		a.Outcome = Funds
		return a, nil
	case word == "NO" && rest == Limit.String():
		a.Outcome = Limit
		return a, nil
	}
	return Answer{}, fmt.Errorf("ledger answers %q", line)
}

// Balance returns an account's balance. Over UDP the answer to an earlier, repeated
// question may come late and be taken for this one's.
func (c *Client) Balance(ctx context.Context, account uint16) (uint64, error) {
	var balance uint64
	line, err := c.do(ctx, fmt.Sprintf("B %d", account), func(w []string) bool {
		return w[0] == "B" && len(w) == 3 && w[1] == fmt.Sprint(account)
	})
	if err == nil {
		_, err = fmt.Sscanf(line, "B %d %d", &account, &balance)
	}
	return balance, err
}

// Hash returns the number of records and the hash of the state, as [State.Seq] and
// [State.Hash] of the journal so far.
func (c *Client) Hash(ctx context.Context) (seq, hash uint64, err error) {
	line, err := c.do(ctx, "H", func(w []string) bool { return w[0] == "H" && len(w) == 3 })
	if err == nil {
		_, err = fmt.Sscanf(line, "H %d %x", &seq, &hash)
	}
	return seq, hash, err
}

// Stats returns the guest's own counters by name.
func (c *Client) Stats(ctx context.Context) (map[string]uint64, error) {
	line, err := c.do(ctx, "S", func(w []string) bool { return w[0] == "S" })
	if err != nil {
		return nil, err
	}
	stats := make(map[string]uint64)
	for _, w := range strings.Fields(line)[1:] {
		var v uint64
		name, value, _ := strings.Cut(w, "=")
		if _, err := fmt.Sscanf(value, "%d", &v); err != nil {
			return nil, fmt.Errorf("ledger answers %q", line)
		}
		stats[name] = v
	}
	return stats, nil
}

// do sends a request until a line comes back that is its answer.
func (c *Client) do(ctx context.Context, request string, isAnswer func(words []string) bool) (string, error) {
	for attempt := 0; ; attempt++ {
		if attempt > 0 {
			c.Repeats++
		}
		line, err := c.attempt(ctx, request, isAnswer)
		if err == nil {
			return line, nil
		}
		var refused *RefusedError
		if errors.As(err, &refused) {
			return "", err
		}
		if c.conn != nil && !(c.datagrams() && errors.Is(err, errTimeout)) {
			c.Close()
		}
		if ctx.Err() != nil {
			return "", fmt.Errorf("ledger request %q: %w (last attempt: %w)", request, ctx.Err(), err)
		}
	}
}

var errTimeout = errors.New("no answer in time")

func (c *Client) datagrams() bool { return strings.HasPrefix(c.conn.RemoteAddr().Network(), "udp") }

func (c *Client) attempt(ctx context.Context, request string, isAnswer func([]string) bool) (string, error) {
	if c.conn == nil {
		conn, err := c.dial(ctx)
		if err != nil {
			pause(ctx, c.Pause)
			return "", err
		}
		c.conn, c.reader = conn, bufio.NewReader(conn)
		c.Connects++
	}
	conn := c.conn
	var deadline time.Time
	if c.Timeout > 0 {
		deadline = time.Now().Add(c.Timeout)
	}
	if err := conn.SetDeadline(deadline); err != nil {
		return "", err
	}
	// When the context ends, the read below does.
	defer context.AfterFunc(ctx, func() { _ = conn.SetDeadline(time.Unix(1, 0)) })()
	if _, err := conn.Write([]byte(request + "\n")); err != nil {
		return "", timeout(err)
	}
	for {
		line, err := c.reader.ReadString('\n')
		if err != nil {
			if c.datagrams() { // refused by ICMP: the server is not up yet
				pause(ctx, c.Pause)
			}
			return "", timeout(err)
		}
		line = strings.TrimSuffix(line, "\n")
		words := strings.Fields(line)
		switch {
		case len(words) == 0:
		case words[0] == "ERR" && len(words) == 3 && (words[1] == "-" || isAnswer(words)):
			return "", &RefusedError{words[2]}
		case isAnswer(words):
			return line, nil
		}
	}
}

func timeout(err error) error {
	var n net.Error
	if errors.As(err, &n) && n.Timeout() {
		return errTimeout
	}
	return err
}

func pause(ctx context.Context, d time.Duration) {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
	case <-t.C:
	}
}
