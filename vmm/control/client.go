package control

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"strconv"

	"golang.org/x/sys/unix"
)

// maxAnswer bounds an answer in bytes.
const maxAnswer = 1 << 20

// Client talks to the control socket of one guest. Its errors are of type [*Error], but for a
// context that ended.
type Client struct {
	path string
	http http.Client
}

// NewClient returns a client for the socket at path. It connects when it is first used; Close ends idle connections.
func NewClient(path string) *Client {
	c := &Client{path: path}
	c.http.Transport = &http.Transport{
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return c.dial(ctx) },
		MaxIdleConns:      1,
		DisableKeepAlives: false,
	}
	return c
}

// Close ends idle connections.
func (c *Client) Close() { c.http.CloseIdleConnections() }

func (c *Client) dial(ctx context.Context) (net.Conn, error) {
	var d net.Dialer
	return d.DialContext(ctx, "unix", c.path)
}

// explain turns a failure to connect into an Error.
func (c *Client) explain(err error) error {
	switch {
	case errors.Is(err, context.Canceled), errors.Is(err, context.DeadlineExceeded):
		return err
	case errors.Is(err, fs.ErrNotExist), errors.Is(err, unix.ECONNREFUSED):
		return &Error{Code: CodeNotRunning, Status: http.StatusNotFound, Message: "no guest listens on " + c.path,
			Remedy: "start it with ftvmm run --name NAME, or name its socket with --control"}
	case errors.Is(err, fs.ErrPermission):
		return &Error{Code: CodeNotPermitted, Status: http.StatusForbidden, Message: "this user may not control the guest at " + c.path,
			Remedy: "use the account that runs the guest, or root"}
	}
	return &Error{Code: CodeUnreachable, Status: http.StatusBadGateway, Message: fmt.Sprintf("talk to the guest at %s: %v", c.path, err),
		Remedy: "look whether its ftvmm is still alive"}
}

// call makes one request and decodes the answer into out, unless that is nil.
func (c *Client) call(ctx context.Context, method, path string, in, out any) error {
	var body io.Reader
	if in != nil {
		b, err := json.Marshal(in)
		if err != nil {
			return fmt.Errorf("control: encode the request: %w", err)
		}
		body = bytes.NewReader(b)
	}
	req, err := http.NewRequestWithContext(ctx, method, "http://guest"+path, body)
	if err != nil {
		return fmt.Errorf("control: %w", err)
	}
	resp, err := c.http.Do(req)
	if err != nil {
		return c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return refusal(resp)
	}
	if out == nil {
		return nil
	}
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(out); err != nil {
		return c.explain(fmt.Errorf("read the answer: %w", err))
	}
	return nil
}

// refusal reads the Error in an answer.
func refusal(resp *http.Response) *Error {
	var doc errorDocument
	if err := json.NewDecoder(io.LimitReader(resp.Body, maxAnswer)).Decode(&doc); err != nil || doc.Error.Code == "" {
		return &Error{Code: CodeFailed, Status: resp.StatusCode, Message: "the guest's ftvmm answers " + resp.Status, Remedy: "is it ftvmm that listens there?"}
	}
	doc.Error.Status = resp.StatusCode
	return &doc.Error
}

// Status returns the guest's status.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var st Status
	err := c.call(ctx, http.MethodGet, "/v1/status", nil, &st)
	return st, err
}

// Stats returns the guest's counters.
func (c *Client) Stats(ctx context.Context) (Stats, error) {
	var st Stats
	err := c.call(ctx, http.MethodGet, "/v1/stats", nil, &st)
	return st, err
}

// Pause stops the guest and its time.
func (c *Client) Pause(ctx context.Context) error { return c.verb(ctx, "pause", nil) }

// Resume lets it go on.
func (c *Client) Resume(ctx context.Context) error { return c.verb(ctx, "resume", nil) }

// Reset presses the reset button.
func (c *Client) Reset(ctx context.Context) error { return c.verb(ctx, "reset", nil) }

// PowerButton presses the power button.
func (c *Client) PowerButton(ctx context.Context) error { return c.verb(ctx, "power-button", nil) }

// Quit ends the VMM at once.
func (c *Client) Quit(ctx context.Context) error { return c.verb(ctx, "quit", nil) }

// Pair returns what this side of a pair is doing.
func (c *Client) Pair(ctx context.Context) (Pair, error) {
	var p Pair
	err := c.call(ctx, http.MethodGet, "/v1/pair", nil, &p)
	return p, err
}

// Failover begins to hand the guest over to the other side. It returns when that has begun; Pair tells how it goes.
func (c *Client) Failover(ctx context.Context) error { return c.verb(ctx, "failover", nil) }

// Force makes the side live although the arbiter's record does not allow it: what the other side had
// promised is lost.
func (c *Client) Force(ctx context.Context) error { return c.verb(ctx, "force", nil) }

// Save writes the guest's state to a file on its host; path is absolute.
func (c *Client) Save(ctx context.Context, path string) error {
	return c.verb(ctx, "save", SaveRequest{Path: path})
}

func (c *Client) verb(ctx context.Context, name string, in any) error {
	return c.call(ctx, http.MethodPost, "/v1/"+name, in, nil)
}

// Console attaches to a console. Reading gives recent output, then what follows, then
// [io.EOF] when the guest has ended; writing types, if write is set. ctx bounds the attaching alone.
func (c *Client) Console(ctx context.Context, name string, write bool) (io.ReadWriteCloser, error) {
	conn, err := c.dial(ctx)
	if err != nil {
		return nil, c.explain(err)
	}
	stop := context.AfterFunc(ctx, func() { conn.Close() })
	r, err := c.upgrade(conn, name, write)
	if !stop() && err == nil {
		err = ctx.Err()
	}
	if err != nil {
		conn.Close()
		return nil, err
	}
	return &attachment{Conn: conn, r: r}, nil
}

func (c *Client) upgrade(conn net.Conn, name string, write bool) (*bufio.Reader, error) {
	target := "http://guest/v1/console/" + url.PathEscape(name) + "?write=" + strconv.FormatBool(write)
	req, err := http.NewRequest(http.MethodGet, target, nil)
	if err != nil {
		return nil, &Error{Code: CodeBadRequest, Status: http.StatusBadRequest, Message: fmt.Sprintf("%q is no name of a console", name), Remedy: "ftvmm vm status lists the consoles"}
	}
	req.Header.Set("Connection", "Upgrade")
	req.Header.Set("Upgrade", ConsoleProtocol)
	if err := req.Write(conn); err != nil {
		return nil, c.explain(err)
	}
	r := bufio.NewReader(conn)
	resp, err := http.ReadResponse(r, req)
	if err != nil {
		return nil, c.explain(err)
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusSwitchingProtocols {
		return nil, refusal(resp)
	}
	return r, nil
}

// attachment is a connection whose beginning may have been read already.
type attachment struct {
	net.Conn
	r *bufio.Reader
}

func (a *attachment) Read(p []byte) (int, error) { return a.r.Read(p) }
