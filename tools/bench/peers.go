package main

import (
	"context"
	"errors"
	"fmt"
	"net"
	"path/filepath"
	"slices"
	"time"
)

// What else there is for going on with a guest on another host, measured so that ours can be put beside it: two
// QEMU processes on this host, joined over loopback. There is no disk and no network card in the guest, which
// can only be to QEMU's good.

// The guest computes, and says so with a byte to port 0x80 after every reportWords words: progress
// that needs no clock of the guest's, and that the host can put a time to.
const (
	reportWords = 20_000
	reportPort  = 0x80
	wordSize    = 8
)

// Bounds of waits.
const (
	guestTimeout   = 30 * time.Second // firmware, and one round over the guest's memory
	migrateTimeout = 60 * time.Second
	goOnTimeout    = 20 * time.Second
	pollInterval   = 5 * time.Millisecond
)

// errNotEnded is why a migration may be given up.
var errNotEnded = fmt.Errorf("it has not ended after %v; the guest writes memory faster than it is sent", migrateTimeout)

// peerFigure completes a figure that is there for comparison only.
func peerFigure(f figure) figure {
	f.peer = true
	return f
}

// member is a QEMU process of a pair.
type member struct {
	*machine
	monitor *qmp
	socket  string
}

// memberVM is how a member is started.
type memberVM struct {
	*qemu
	memoryMiB int
	socket    string // of the monitor
	incoming  bool   // it waits for the other one's guest
}

func (v *memberVM) command(g guest) []string {
	c := []string{
		v.path, "-machine", "pc,accel=kvm,kernel-irqchip=off", "-cpu", "qemu64", "-m", fmt.Sprint(v.memoryMiB), "-nodefaults", "-display", "none",
		"-chardev", "stdio,id=reports", "-device", fmt.Sprintf("isa-debugcon,iobase=%#x,chardev=reports", reportPort),
		"-qmp", "unix:" + v.socket, "-kernel", g.kernel, "-append", g.append,
	}
	if v.incoming {
		c = append(c, "-incoming", "defer")
	}
	return c
}

// withPair starts a guest that writes size bytes of its memory over and over, and a second QEMU that waits for
// it, and calls f when the guest has been round its memory once. Both are gone afterwards.
func (b *bench) withPair(ctx context.Context, v vm, memoryMiB, size int, f func(primary, secondary *member) error) error {
	q, ok := v.(*qemu)
	if !ok {
		return fmt.Errorf("%s is no QEMU", v.name())
	}
	g := guest{append: fmt.Sprintf("size=%d rounds=1000000000 exit_every=%d", size, reportWords)}
	var pair [2]*member
	for i, name := range []string{"primary", "secondary"} {
		m, err := b.startMember(ctx, &memberVM{q, memoryMiB, filepath.Join(b.dir, name+".qmp"), i == 1}, g)
		if err != nil {
			return fmt.Errorf("start the %s: %w", name, err)
		}
		defer m.end()
		pair[i] = m
	}
	primary, secondary := pair[0], pair[1]
	err := primary.reports(ctx, size/wordSize/reportWords+1, guestTimeout)
	if err == nil {
		err = f(primary, secondary)
	}
	if err != nil {
		primary.end()
		secondary.end()
		err = fmt.Errorf("%w\nthe primary said:\n%sthe secondary said:\n%s", err, primary.log.Bytes(), secondary.log.Bytes())
	}
	return err
}

func (b *bench) startMember(ctx context.Context, v *memberVM, g guest) (*member, error) {
	l, err := listenQMP(v.socket)
	if err != nil {
		return nil, err
	}
	defer l.Close()
	m, err := b.startGuest(ctx, v, "compute", g)
	if err != nil {
		return nil, err
	}
	monitor, err := acceptQMP(ctx, l)
	if err != nil {
		m.kill()
		return nil, fmt.Errorf("%w\n%s", err, m.log.Bytes())
	}
	return &member{m, monitor, v.socket}, nil
}

// end kills the process; it may be called more than once.
func (m *member) end() {
	m.kill()
	m.monitor.conn.Close()
}

// reports waits until the guest has reported n times.
func (m *member) reports(ctx context.Context, n int, timeout time.Duration) error {
	return m.waitFor(ctx, timeout, func() bool { return len(m.out) >= n })
}

// waitFor waits until met, which is called with the lock held after each report, says so.
func (m *member) waitFor(ctx context.Context, timeout time.Duration, met func() bool) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	defer context.AfterFunc(ctx, func() {
		m.mu.Lock()
		defer m.mu.Unlock()
		m.changed.Broadcast()
	})()
	m.mu.Lock()
	defer m.mu.Unlock()
	for !met() {
		switch {
		case m.eof:
			return fmt.Errorf("QEMU ended after %d reports of the guest", len(m.out))
		case ctx.Err() != nil:
			return fmt.Errorf("no more than %d reports of the guest after %v: %w", len(m.out), timeout, ctx.Err())
		}
		m.changed.Wait()
	}
	return nil
}

// run lets time pass and returns how many reports came in a second, and when that was.
func (m *member) run(ctx context.Context, d time.Duration) (rate float64, from, to time.Time, err error) {
	from = time.Now()
	before := m.count()
	select {
	case <-ctx.Done():
		return 0, from, from, ctx.Err()
	case <-m.ended:
		return 0, from, from, errors.New("QEMU ended")
	case <-time.After(d):
	}
	to = time.Now()
	return float64(m.count()-before) / to.Sub(from).Seconds(), from, to, nil
}

func (m *member) count() int {
	m.mu.Lock()
	defer m.mu.Unlock()
	return len(m.out)
}

// times returns when reports came; those that came together count once.
func (m *member) times() []time.Time {
	m.mu.Lock()
	defer m.mu.Unlock()
	t := make([]time.Time, len(m.stamps))
	for i, s := range m.stamps {
		t[i] = s.at
	}
	return t
}

// firstSince waits for a report at since or later and returns when it came.
func (m *member) firstSince(ctx context.Context, since time.Time) (at time.Time, err error) {
	err = m.waitFor(ctx, goOnTimeout, func() bool {
		i, _ := slices.BinarySearchFunc(m.stamps, since, func(s stamp, t time.Time) int { return s.at.Compare(t) })
		if i == len(m.stamps) {
			return false
		}
		at = m.stamps[i].at
		return true
	})
	return at, err
}

// migration is the part of query-migrate's answer that is used here.
type migration struct {
	Status    string                        `json:"status"`
	Downtime  int64                         `json:"downtime"` // milliseconds
	ErrorDesc string                        `json:"error-desc"`
	Addresses []struct{ Host, Port string } `json:"socket-address"`
}

// channel is what joins a pair.
type channel string

const (
	overTCP  channel = "TCP"
	overUNIX channel = "UNIX"
)

// migrateTo sends the guest to another member until the migration's status is the wanted one.
func (m *member) migrateTo(ctx context.Context, to *member, over channel, status string) (migration, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, migrateTimeout, errNotEnded)
	defer cancel()
	var state migration
	uri := "tcp:127.0.0.1:0"
	if over == overUNIX {
		uri = "unix:" + to.socket + ".guest"
	}
	if err := to.monitor.execute(ctx, "migrate-incoming", map[string]any{"uri": uri}, nil); err != nil {
		return state, err
	}
	if over == overTCP { // which port it is
		if err := to.monitor.execute(ctx, "query-migrate", nil, &state); err != nil {
			return state, err
		}
		if len(state.Addresses) != 1 {
			return state, fmt.Errorf("QEMU listens at %v for a guest", state.Addresses)
		}
		uri = "tcp:" + net.JoinHostPort(state.Addresses[0].Host, state.Addresses[0].Port)
	}
	if err := m.monitor.execute(ctx, "migrate", map[string]any{"uri": uri}, nil); err != nil {
		return state, err
	}
	for {
		state = migration{}
		if err := m.monitor.execute(ctx, "query-migrate", nil, &state); err != nil {
			return state, err
		}
		switch state.Status {
		case status:
			return state, nil
		case "failed", "cancelled", "completed":
			return state, fmt.Errorf("the migration is %s: %s", state.Status, state.ErrorDesc)
		}
		select {
		case <-ctx.Done():
			return state, fmt.Errorf("the migration is %s: %w", state.Status, context.Cause(ctx))
		case <-time.After(pollInterval):
		}
	}
}
