package main

import (
	"fmt"
	"io"
	"strings"
	"sync"
	"time"
)

// boardPeriod is the time between two pictures of the live line.
const boardPeriod = 100 * time.Millisecond

// board is what the person at the terminal sees: lines that stay, and below them, on a terminal, one that lives.
type board struct {
	screen io.Writer
	live   bool
	line   func() string // the live line; "" for none

	mu    sync.Mutex
	shown bool
	stop  chan struct{}
	ended chan struct{}
}

// newBoard returns a board that redraws the line, if live, until it is closed.
func newBoard(out io.Writer, live bool, line func() string) *board {
	b := &board{screen: out, live: live, line: line, stop: make(chan struct{}), ended: make(chan struct{})}
	go b.run()
	return b
}

func (b *board) run() {
	defer close(b.ended)
	if !b.live {
		return
	}
	tick := time.NewTicker(boardPeriod)
	defer tick.Stop()
	for {
		select {
		case <-b.stop:
			return
		case <-tick.C:
			text := b.line()
			b.mu.Lock()
			if text != "" || b.shown {
				fmt.Fprintf(b.screen, "\r\x1b[K%s", text)
				b.shown = text != ""
			}
			b.mu.Unlock()
		}
	}
}

// say writes a line that stays.
func (b *board) say(format string, args ...any) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clear()
	fmt.Fprintf(b.screen, format+"\n", args...)
}

// step says what comes next.
func (b *board) step(format string, args ...any) { b.say("== "+format, args...) }

func (b *board) clear() {
	if b.shown {
		fmt.Fprint(b.screen, "\r\x1b[K")
		b.shown = false
	}
}

// Close takes the live line away.
func (b *board) Close() {
	close(b.stop)
	<-b.ended
	b.mu.Lock()
	defer b.mu.Unlock()
	b.clear()
}

// bar draws how much of the work is done.
func bar(done, total int) string {
	const width = 20
	n := width * min(done, total) / max(total, 1)
	return "[" + strings.Repeat("#", n) + strings.Repeat(".", width-n) + "]"
}

// thousands writes a number with separators.
func thousands(n int) string {
	text := fmt.Sprint(n)
	for i := len(text) - 3; i > 0; i -= 3 {
		text = text[:i] + "," + text[i:]
	}
	return text
}
