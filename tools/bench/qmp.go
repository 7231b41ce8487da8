package main

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"time"
)

// qmpTimeout bounds the wait for one answer of QEMU's monitor.
const qmpTimeout = 20 * time.Second

// qmp is a connection to QEMU's monitor (QMP, docs/interop/qmp-spec.txt in its sources), for one goroutine.
type qmp struct {
	conn   net.Conn
	in     *json.Decoder
	events []qmpEvent // all that came so far
}

// qmpEvent is what QEMU reports unasked, and when it did by the host's clock.
type qmpEvent struct {
	name string
	at   time.Time
}

// qmpMessage is any message of QEMU's.
type qmpMessage struct {
	Greeting json.RawMessage `json:"QMP"`
	Return   json.RawMessage `json:"return"`
	Error    *struct {
		Class, Desc string
	} `json:"error"`
	Event     string `json:"event"`
	Timestamp struct {
		Seconds, Microseconds int64
	} `json:"timestamp"`
}

// listenQMP waits at path for a QEMU that is to be started with "-qmp unix:path".
func listenQMP(path string) (*net.UnixListener, error) {
	if err := os.Remove(path); err != nil && !os.IsNotExist(err) {
		return nil, err
	}
	return net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
}

// acceptQMP waits for QEMU's greeting and answers it.
func acceptQMP(ctx context.Context, l *net.UnixListener) (*qmp, error) {
	if err := l.SetDeadline(qmpDeadline(ctx)); err != nil {
		return nil, err
	}
	conn, err := l.Accept()
	if err != nil {
		return nil, fmt.Errorf("QEMU does not open its monitor: %w", err)
	}
	q := &qmp{conn: conn, in: json.NewDecoder(conn)}
	if err = q.greet(ctx); err != nil {
		conn.Close()
		return nil, err
	}
	return q, nil
}

func (q *qmp) greet(ctx context.Context) error {
	m, err := q.receive(ctx)
	if err != nil {
		return fmt.Errorf("QMP greeting: %w", err)
	}
	if m.Greeting == nil {
		return fmt.Errorf("QMP: there is no greeting")
	}
	return q.execute(ctx, "qmp_capabilities", nil, nil)
}

// qmpDeadline returns until when to wait for what comes next.
func qmpDeadline(ctx context.Context) time.Time {
	limit := time.Now().Add(qmpTimeout)
	if d, ok := ctx.Deadline(); ok && d.Before(limit) {
		return d
	}
	return limit
}

// receive returns the next message. An event is also kept.
func (q *qmp) receive(ctx context.Context) (m qmpMessage, err error) {
	if err := q.conn.SetReadDeadline(qmpDeadline(ctx)); err != nil {
		return m, err
	}
	if err := q.in.Decode(&m); err != nil {
		return m, err
	}
	if m.Event != "" {
		q.events = append(q.events, qmpEvent{m.Event, time.Unix(m.Timestamp.Seconds, m.Timestamp.Microseconds*1e3)})
	}
	return m, nil
}

// execute gives a command and stores its answer in result, if that is not nil.
func (q *qmp) execute(ctx context.Context, command string, arguments map[string]any, result any) error {
	request := map[string]any{"execute": command}
	if arguments != nil {
		request["arguments"] = arguments
	}
	p, err := json.Marshal(request)
	if err != nil {
		return err
	}
	if err := q.conn.SetWriteDeadline(qmpDeadline(ctx)); err != nil {
		return err
	}
	if _, err := q.conn.Write(p); err != nil {
		return fmt.Errorf("QMP %s: %w", command, err)
	}
	for {
		m, err := q.receive(ctx)
		switch {
		case err != nil:
			return fmt.Errorf("QMP %s: %w", command, err)
		case m.Error != nil:
			return fmt.Errorf("QMP %s: %s (%s)", command, m.Error.Desc, m.Error.Class)
		case m.Return != nil && result != nil:
			return json.Unmarshal(m.Return, result)
		case m.Return != nil:
			return nil
		}
	}
}

// wait returns when an event happened that QEMU reports at since or later.
func (q *qmp) wait(ctx context.Context, event string, since time.Time) (time.Time, error) {
	for seen := 0; ; {
		for ; seen < len(q.events); seen++ {
			if e := q.events[seen]; e.name == event && !e.at.Before(since) {
				return e.at, nil
			}
		}
		if _, err := q.receive(ctx); err != nil {
			return time.Time{}, fmt.Errorf("QMP: wait for %s: %w", event, err)
		}
	}
}
