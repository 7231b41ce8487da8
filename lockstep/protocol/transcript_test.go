package protocol_test

import (
	"flag"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/stretchr/testify/require"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

var update = flag.Bool("update", false, "rewrite the expected output of transcripts")

// TestTranscripts runs the scripts in testdata. A line that begins with ">" is a command; what
// follows it is all that the two nodes then wanted done. Heartbeats are left out.
//
// Commands (S is A or B):
//
//	start S [RULE]       start the process of S, as a new incarnation
//	crash S              end it: its messages arrive, its memory is gone
//	link                 make a connection
//	down S               tell S that its connection is gone
//	deliver [N]          deliver messages in flight, and those that follow; N: only so many
//	drop                 lose what is in flight
//	tick S N             let N ticks pass
//	arbiter [N]          carry out all waiting requests and answer them; N: only so many
//	arbiter mute         carry them out, but lose the answers
//	arbiter drop         lose the requests
//	arbiter forget       lose the record
//	exit S [in] [done] [out] [tainted]  let the live guest make a stop
//	replay S             let the backup replay what it may
//	flip S               change a bit of its guest's memory
//	frozen S             say that the guest stands
//	cut S                ask for a cut
//	hold                 from here on the shells do not answer a Stage at once
//	want S               answer it
//	switch S, force S    do what a person asks for
//	status               phases and the record
func TestTranscripts(t *testing.T) {
	files, err := filepath.Glob("testdata/*.txt")
	require.NoError(t, err)
	require.NotEmpty(t, files)
	for _, f := range files {
		t.Run(strings.TrimSuffix(filepath.Base(f), ".txt"), func(t *testing.T) {
			want, err := os.ReadFile(f)
			require.NoError(t, err)
			h := &pair{t: t}
			var got strings.Builder
			skipping := false
			for line := range strings.Lines(string(want)) {
				if cmd, ok := strings.CutPrefix(line, "> "); ok {
					got.WriteString(line)
					got.WriteString(h.run(strings.Fields(cmd)))
					skipping = true
					continue
				}
				if strings.HasPrefix(line, "#") || strings.TrimSpace(line) == "" {
					skipping = false
				}
				if !skipping {
					got.WriteString(line)
				}
			}
			if *update {
				require.NoError(t, os.WriteFile(f, []byte(got.String()), 0o644))
				return
			}
			require.Equal(t, string(want), got.String())
		})
	}
}

// letter is a message in flight.
type letter struct {
	to   protocol.Side
	life int
	conn uint64
	m    protocol.Message
}

// question is a request that waits for the arbiter.
type question struct {
	from protocol.Side
	life int
	r    protocol.Request
}

// host is a shell as simple as it can be.
type host struct {
	node    *protocol.Node
	life    int
	at      protocol.Point
	items   []protocol.Item // to replay
	flipped bool
}

type pair struct {
	t         *testing.T
	hosts     [3]host // by side
	conn      uint64
	flight    []letter
	questions []question
	record    protocol.Record
	hold      bool
	out       strings.Builder
}

func (h *pair) side(s string) (protocol.Side, *host) {
	switch s {
	case "A":
		return protocol.A, &h.hosts[protocol.A]
	case "B":
		return protocol.B, &h.hosts[protocol.B]
	}
	h.t.Fatalf("no side %q", s)
	return protocol.None, nil
}

func (h *pair) run(cmd []string) string {
	h.out.Reset()
	arg := func(i int) string {
		if i < len(cmd) {
			return cmd[i]
		}
		return ""
	}
	number := func(i, otherwise int) int {
		if arg(i) == "" {
			return otherwise
		}
		n, err := strconv.Atoi(arg(i))
		require.NoError(h.t, err)
		return n
	}
	switch cmd[0] {
	case "start":
		s, x := h.side(arg(1))
		cfg := protocol.DefaultConfig(s)
		cfg.HeartbeatTicks, cfg.SuspectTicks, cfg.DeadTicks = 10, 20, 30
		cfg.ArbiterTicks, cfg.PollTicks, cfg.ColdTicks = 5, 50, 3
		cfg.LeadTicks, cfg.TightTicks = 1000, 1000
		cfg.Create = s == protocol.A
		*x = host{life: x.life + 1}
		cfg.Incarnation = uint64(s)<<32 | uint64(x.life)<<16
		for _, c := range []protocol.Commit{protocol.Received, protocol.Checkpointed} {
			if arg(2) == c.String() {
				cfg.Commit = c
			}
		}
		x.node = protocol.New(cfg)
	case "crash":
		_, x := h.side(arg(1))
		x.node = nil
	case "link":
		h.conn++
		for s := protocol.A; s <= protocol.B; s++ {
			h.hosts[s].node.LinkUp(h.conn)
		}
	case "down":
		_, x := h.side(arg(1))
		x.node.LinkDown(h.conn)
	case "deliver":
		for n := number(1, 1000); n > 0 && len(h.flight) > 0; n-- {
			l := h.flight[0]
			h.flight = h.flight[1:]
			if x := &h.hosts[l.to]; x.node != nil && x.life == l.life {
				x.node.Step(l.conn, l.m)
				h.settle()
			}
		}
	case "drop":
		h.flight = nil
	case "tick":
		_, x := h.side(arg(1))
		for range number(2, 1) {
			x.node.Tick()
			h.settle()
		}
	case "arbiter":
		h.arbitrate(arg(1), number)
	case "exit":
		_, x := h.side(arg(1))
		h.exit(x, cmd[2:])
	case "replay":
		_, x := h.side(arg(1))
		h.replay(x)
	case "flip":
		_, x := h.side(arg(1))
		x.flipped = true
	case "frozen":
		_, x := h.side(arg(1))
		x.node.Frozen(true)
	case "cut":
		_, x := h.side(arg(1))
		x.node.NeedCut("asked for")
	case "hold":
		h.hold = true
	case "want":
		_, x := h.side(arg(1))
		x.node.CutWant(nil)
	case "switch":
		_, x := h.side(arg(1))
		fmt.Fprintln(&h.out, x.node.SwitchOver())
	case "force":
		_, x := h.side(arg(1))
		fmt.Fprintln(&h.out, x.node.Force())
	case "status":
		for s := protocol.A; s <= protocol.B; s++ {
			if x := &h.hosts[s]; x.node == nil {
				fmt.Fprintf(&h.out, "%v down\n", s)
			} else {
				fmt.Fprintf(&h.out, "%v %v\n", s, x.node.Phase())
			}
		}
		fmt.Fprintf(&h.out, "arbiter %v\n", h.record)
	default:
		h.t.Fatalf("no command %q", cmd[0])
	}
	h.settle()
	return h.out.String()
}

// arbitrate carries out requests that wait.
func (h *pair) arbitrate(how string, number func(i, otherwise int) int) {
	switch how {
	case "drop":
		h.questions = nil
		return
	case "forget":
		h.record = protocol.Record{}
		return
	}
	n := 1000
	if how != "mute" {
		n = number(1, n)
	}
	for ; n > 0 && len(h.questions) > 0; n-- {
		q := h.questions[0]
		h.questions = h.questions[1:]
		a := protocol.Answer{ID: q.r.ID, Record: h.record}
		if q.r.Swap && h.record.Epoch == q.r.Record.Epoch-1 {
			h.record = q.r.Record
			a.Swapped, a.Record = true, h.record
			fmt.Fprintf(&h.out, "arbiter: %v\n", h.record)
		}
		if x := &h.hosts[q.from]; how != "mute" && x.node != nil && x.life == q.life {
			x.node.Answer(a)
			h.settle()
		}
	}
}

// exit lets a live guest make a stop. The entry that is logged says what happened there.
func (h *pair) exit(x *host, what []string) {
	x.at = protocol.Point{Exit: x.at.Exit + 1}
	text := strings.Join(what, " ")
	if text != "" {
		x.node.Log(x.at, []byte(text), strings.Contains(text, "done"))
	}
	if strings.Contains(text, "out") {
		x.node.Output(x.at, []byte("out"))
	}
	x.node.Mark(x.at, x.digest(), strings.Contains(text, "tainted"))
}

// replay makes the stops that the log allows.
func (h *pair) replay(x *host) {
	for len(x.items) > 0 {
		last := x.items[len(x.items)-1].Point
		if !x.at.Before(last) {
			x.items = nil
			return
		}
		x.at = protocol.Point{Exit: x.at.Exit + 1}
		for len(x.items) > 0 && !x.at.Before(x.items[0].Point) {
			if i := x.items[0]; !i.Mark && strings.Contains(string(i.Data), "out") {
				x.node.Output(x.at, []byte("out"))
			}
			x.items = x.items[1:]
		}
		if !x.node.Executed(x.at, x.digest(), false) {
			return
		}
	}
}

func (x *host) digest() protocol.Digest {
	d := protocol.Digest{byte(x.at.Exit)}
	if x.flipped {
		d[1] = 1
	}
	return d
}

// settle carries out what the nodes want until they want nothing more.
func (h *pair) settle() {
	for again := true; again; {
		again = false
		for s := protocol.A; s <= protocol.B; s++ {
			x := &h.hosts[s]
			if x.node == nil {
				continue
			}
			todo := x.node.Ready()
			for _, a := range todo {
				again = true
				h.do(s, x, a)
			}
			x.node.Advance()
		}
	}
}

func (h *pair) do(s protocol.Side, x *host, a protocol.Action) {
	send, sends := a.(protocol.Send)
	if !sends || send.Message.Type != protocol.MsgHeartbeat {
		fmt.Fprintf(&h.out, "%v: %v\n", s, a)
	}
	n := x.node
	switch a := a.(type) {
	case protocol.Send:
		h.flight = append(h.flight, letter{s.Other(), h.hosts[s.Other()].life, a.Conn, a.Message})
	case protocol.Ask:
		h.questions = append(h.questions, question{s, x.life, a.Request})
	case protocol.Feed:
		x.items = append(x.items, a.Items...)
	case protocol.Boot, protocol.GoLive, protocol.Follow:
		x.at, x.items = protocol.Point{}, nil
	case protocol.Prepare:
		n.Prepared()
	case protocol.Precopy:
		n.Chunk([]byte("memory"))
		n.PrecopyDone()
	case protocol.StopForCut:
		n.CutReady(nil)
	case protocol.TakeCut:
		x.at = protocol.Point{}
		n.CutTaken([]byte("state"))
	case protocol.Stage:
		if !h.hold {
			n.CutWant(nil)
		}
	case protocol.CollectPages:
		n.CutPages([]byte("pages"), true)
	case protocol.Apply:
		x.at, x.items, x.flipped = protocol.Point{}, nil, false
		n.CutApplied()
	}
}
