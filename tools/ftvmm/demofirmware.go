package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/vmm"
)

// The part of the demo that boots firmware.
const (
	firmwareMemory = 64 << 20
	firmwareEnd    = "No bootable device."
)

// screen is a console that is shown to the person, line by line, and watched for a text.
type screen struct {
	show func(line string)
	want string

	mu   sync.Mutex
	all  bytes.Buffer
	line []byte
	seen chan struct{} // closed when want has appeared
}

func newScreen(show func(string), want string) *screen {
	return &screen{show: show, want: want, seen: make(chan struct{})}
}

// Output takes what the guest writes.
func (s *screen) Output(p []byte) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.want != "" {
		s.all.Write(p)
		if bytes.Contains(s.all.Bytes(), []byte(s.want)) {
			close(s.seen)
			s.want = ""
		}
	}
	for _, b := range p {
		if b == '\n' {
			if line := printable(s.line); line != "" {
				s.show(line)
			}
			s.line = s.line[:0]
		} else if len(s.line) < 256 {
			s.line = append(s.line, b)
		}
	}
}

// Start does nothing: nobody types.
func (s *screen) Start(func([]byte)) {}

// printable takes control bytes and terminal escapes out of a line.
func printable(line []byte) string {
	var out []byte
	escape := false
	for _, b := range line {
		switch {
		case b == 0x1b:
			escape = true
		case escape:
			escape = b == '[' || b == '?' || b >= '0' && b <= '9' || b == ';'
		case b >= ' ' && b < 0x7f:
			out = append(out, b)
		}
	}
	return string(out)
}

// running is a machine that runs in a goroutine of its own.
type running struct {
	*vmm.Machine
	ended chan struct{}
	end   vmm.Exit
	err   error
}

func start(cfg vmm.Config) (*running, error) {
	m, err := vmm.New(cfg)
	if err != nil {
		return nil, err
	}
	r := &running{Machine: m, ended: make(chan struct{})}
	go func() {
		defer close(r.ended)
		r.end, r.err = m.Run(context.Background())
	}()
	return r, nil
}

// stop ends the machine, if it has not ended, and frees it.
func (r *running) stop() error {
	r.Quit()
	<-r.ended
	return errors.Join(r.err, r.Machine.Close())
}

// await waits for ch, the guest's end, or the demo's patience.
func (r *running) await(ctx context.Context, ch <-chan struct{}, what string) error {
	limit := time.NewTimer(demoPatience)
	defer limit.Stop()
	select {
	case <-ch:
		return nil
	case <-r.ended:
		if ch == (<-chan struct{})(r.ended) {
			return nil
		}
		return fmt.Errorf("the guest ended (%s %s) before %s", r.end.Reason, r.end.Detail, what)
	case <-limit.C:
		return fmt.Errorf("%s did not happen within %v", what, demoPatience)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// firmware boots SeaBIOS to its end on a serial console.
func (d *demo) firmware(ctx context.Context) error {
	path, err := firmware.FindSeaBIOS()
	var missing *firmware.Error
	if errors.As(err, &missing) {
		d.say("   its boot is left out: %v", missing)
		return nil
	}
	if err != nil {
		return err
	}
	image, err := firmware.ReadImage(path)
	if err != nil {
		return err
	}
	d.step("SeaBIOS (%s) boots on a guest's serial console", path)
	began := time.Now()
	screen := newScreen(func(l string) { d.say("   | %s", l) }, firmwareEnd)
	m, err := start(vmm.Config{Name: "demo-firmware", Memory: firmwareMemory, Firmware: image, Serial: []vmm.Console{screen}})
	if err != nil {
		return err
	}
	err = m.await(ctx, screen.seen, "the end of the firmware's search for a boot device")
	d.report.FirmwareMS = time.Since(began).Milliseconds()
	return errors.Join(err, m.stop())
}
