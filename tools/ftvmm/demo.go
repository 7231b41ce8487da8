package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spf13/cobra"

	"github.com/ftvmm/ftvmm/firmware"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/integration/guests/ledger"
	"github.com/ftvmm/ftvmm/mirror/disk"
	"github.com/ftvmm/ftvmm/mirror/nic"
	"github.com/ftvmm/ftvmm/mirror/nic/user"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/backend"
	"github.com/ftvmm/ftvmm/vmm/console"
	"github.com/ftvmm/ftvmm/vmm/control"
)

// Sizes and limits of the demo.
const (
	demoMemory     = 64 << 20
	demoDisk       = 16 << 20
	demoPort       = 7000 // the ledger's, in the guest
	demoAddress    = "10.0.2.15"
	maxDemoClients = 64
	// demoPatience bounds each wait for a guest: on a host that emulates guest code firmware takes a
	// good part of a minute.
	demoPatience = 2 * time.Minute
	demoTick     = 200 * time.Millisecond
	firmwareEnd  = "No bootable device."
)

func init() {
	extraCommands = append(extraCommands, (*app).demoCommand)
}

// demoReport is what the demo has seen.
type demoReport struct {
	control.Meta
	Verdict          string `json:"verdict"` // good or error
	FirmwareMS       int64  `json:"firmware_ms"`
	GuestReadyMS     int64  `json:"guest_ready_ms"`
	Clients          int    `json:"clients"`
	Transactions     int    `json:"transactions"`
	Acked            int    `json:"acked"`
	Lost             int    `json:"lost"`
	Repeats          int    `json:"repeats"`
	PerSecond        int    `json:"transactions_per_s"`
	LatencyP50MicroS int64  `json:"latency_p50_us"`
	LatencyP99MicroS int64  `json:"latency_p99_us"`
	ShutdownMS       int64  `json:"shutdown_ms"`
	JournalRecords   int    `json:"journal_records"`
}

func (a *app) demoCommand() *cobra.Command {
	var transactions, clients int
	c := &cobra.Command{
		Use:   "demo",
		Short: "boot firmware, then a transaction server in a guest, and check its journal",
		Long: `Show the machine at work, with nothing but this program and a firmware image:

  1. SeaBIOS boots to its end on a guest's serial console.
  2. The embedded ledger guest, a transaction server, boots with a disk and a network card
     on the user network. Clients on this host transfer money over TCP; an answer
     means that the transaction is durable on the guest's disk.
  3. The power button is pressed, the guest shuts down, and its journal is read from the disk
     image: every answer that a client got must be in it.`,
		Args: a.arguments(0, 0),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if transactions < 1 || clients < 1 || clients > maxDemoClients {
				return fail(exitUsage, "bad-value", fmt.Sprintf("take at least one transaction and 1 to %d clients", maxDemoClients),
					"%d transactions by %d clients are out of range", transactions, clients)
			}
			return a.demo(cmd.Context(), transactions, clients)
		},
	}
	c.Flags().IntVar(&transactions, "transactions", 2000, "how many transactions to make")
	c.Flags().IntVar(&clients, "clients", 8, "how many clients make them at the same time")
	return c
}

func (a *app) demo(ctx context.Context, transactions, clients int) error {
	report := demoReport{Meta: control.NewMeta("Demo"), Verdict: "error", Clients: clients, Transactions: transactions}
	began := time.Now()
	if err := a.demoFirmware(ctx); err != nil {
		return fmt.Errorf("firmware: %w", err)
	}
	report.FirmwareMS = time.Since(began).Milliseconds()
	if err := a.demoLedger(ctx, &report); err != nil {
		return fmt.Errorf("ledger: %w", err)
	}
	if report.Lost == 0 && report.Acked == transactions {
		report.Verdict = "good"
	}
	if a.json {
		if err := a.document(report); err != nil {
			return err
		}
	} else {
		fmt.Fprintf(a.out, "%s: %d transactions answered, %d lost; the journal on the disk holds %d records\n",
			report.Verdict, report.Acked, report.Lost, report.JournalRecords)
	}
	if report.Verdict != "good" {
		a.exit = exitFailed
	}
	return nil
}

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

// step says what comes next.
func (a *app) step(format string, args ...any) { fmt.Fprintf(a.err, "== "+format+"\n", args...) }

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

func (a *app) demoFirmware(ctx context.Context) error {
	path, err := firmware.FindSeaBIOS()
	if err != nil {
		return err
	}
	image, err := firmware.ReadImage(path)
	if err != nil {
		return err
	}
	a.step("SeaBIOS (%s) on the serial console", path)
	screen := newScreen(func(l string) { fmt.Fprintf(a.err, "   | %s\n", l) }, firmwareEnd)
	m, err := start(vmm.Config{Name: "demo-firmware", Memory: demoMemory, Firmware: image, Serial: []vmm.Console{screen}})
	if err != nil {
		return err
	}
	err = m.await(ctx, screen.seen, "the end of the firmware's search for a boot device")
	return errors.Join(err, m.stop())
}

func (a *app) demoLedger(ctx context.Context, report *demoReport) (err error) {
	dir, err := os.MkdirTemp("", "ftvmm-demo-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	image := filepath.Join(dir, "ledger.img")
	address, card, err := demoNetwork()
	if err != nil {
		return err
	}
	closeNIC := sync.OnceValue(card.Close)
	defer func() { err = errors.Join(err, closeNIC()) }()
	store, err := disk.Open(image, disk.Options{Create: demoDisk})
	if err != nil {
		return err
	}
	closeDisk := sync.OnceValue(store.Close)
	defer func() { err = errors.Join(err, closeDisk()) }()
	kernel, err := guests.Image("ledgerd")
	if err != nil {
		return err
	}

	a.step("the ledger guest: a transaction server with a disk and a network card")
	began := time.Now()
	screen := newScreen(func(l string) { fmt.Fprintf(a.err, "   | %s\n", l) }, "")
	m, err := start(vmm.Config{
		Name: "demo-ledger", Memory: demoMemory, Kernel: kernel, Cmdline: "ip=" + demoAddress + "/24 gw=10.0.2.2",
		Serial: []vmm.Console{screen},
		Disks:  []vmm.Disk{{Backend: store}},
		NICs:   []vmm.NIC{{Backend: card, MAC: nic.DefaultMAC("demo", 0)}},
	})
	if err != nil {
		return err
	}
	stop := sync.OnceValue(m.stop)
	defer func() { err = errors.Join(err, stop()) }()

	// Waiting for the guest is the first client's business: it connects again until it is answered.
	ready, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	first := ledger.NewClient(1, ledger.Dialer("tcp", address))
	if _, _, err := first.Hash(ready); err != nil {
		return fmt.Errorf("wait for the guest's first answer: %w", err)
	}
	if err := first.Close(); err != nil {
		return err
	}
	report.GuestReadyMS = time.Since(began).Milliseconds()
	a.step("%d clients make %d transactions over TCP", report.Clients, report.Transactions)
	answers, err := a.demoClients(ctx, address, report)
	if err != nil {
		return err
	}

	a.step("power button")
	pressed := time.Now()
	if err := m.PowerButton(); err != nil {
		return err
	}
	if err := m.await(ctx, m.ended, "the guest's shutdown"); err != nil {
		return err
	}
	report.ShutdownMS = time.Since(pressed).Milliseconds()
	if m.err == nil && m.end.Reason != vmm.ExitPowerOff {
		return fmt.Errorf("the guest did not power off: %s %s", m.end.Reason, m.end.Detail)
	}
	if err := errors.Join(stop(), closeNIC(), closeDisk()); err != nil {
		return err
	}

	a.step("read the journal from the disk image")
	f, err := os.Open(image)
	if err != nil {
		return err
	}
	defer f.Close()
	journal, err := ledger.ReadJournal(f)
	if err != nil {
		return err
	}
	report.JournalRecords = len(journal.Records)
	for _, answer := range answers {
		if e := journal.Covers([]ledger.Answer{answer}); e != nil {
			report.Lost++
			err = e
		}
	}
	return err
}

// demoNetwork returns a user network with a port of this host, chosen by it, that leads to the ledger.
func demoNetwork() (address string, card backend.NIC, err error) {
	n, err := user.New(user.Config{Forwards: []user.Forward{{
		Proto: "tcp", Host: netip.MustParseAddrPort("127.0.0.1:0"), Guest: netip.AddrPortFrom(netip.MustParseAddr(demoAddress), demoPort),
	}}})
	if err != nil {
		return "", nil, err
	}
	return n.Forwards()[0].Host.String(), n, nil
}

// demoClients makes the transactions, shows the progress, and returns the answers.
func (a *app) demoClients(ctx context.Context, address string, report *demoReport) ([]ledger.Answer, error) {
	ctx, cancel := context.WithTimeout(ctx, demoPatience)
	defer cancel()
	var (
		done    atomic.Int64
		wg      sync.WaitGroup
		mu      sync.Mutex
		answers []ledger.Answer
		waits   []time.Duration
		failed  error
	)
	began := time.Now()
	for i := range report.Clients {
		share := report.Transactions / report.Clients
		if i < report.Transactions%report.Clients {
			share++
		}
		wg.Add(1)
		go func() {
			defer wg.Done()
			c := ledger.NewClient(uint32(2+i), ledger.Dialer("tcp", address))
			defer c.Close()
			account := uint16(i)
			for n := range share {
				sent := time.Now()
				var (
					got ledger.Answer
					err error
				)
				if n%2 == 0 {
					got, err = c.Deposit(ctx, account, 100)
				} else {
					got, err = c.Transfer(ctx, account, (account+1)%ledger.Accounts, 50)
				}
				mu.Lock()
				if err != nil {
					failed = errors.Join(failed, fmt.Errorf("client %d, transaction %d: %w", i, n, err))
					mu.Unlock()
					return
				}
				answers = append(answers, got)
				waits = append(waits, time.Since(sent))
				mu.Unlock()
				done.Add(1)
			}
			mu.Lock()
			report.Repeats += c.Repeats
			mu.Unlock()
		}()
	}
	stopped := make(chan struct{})
	go func() {
		wg.Wait()
		close(stopped)
	}()
	a.demoProgress(stopped, &done, report.Transactions, began)
	took := time.Since(began)
	report.Acked = len(answers)
	report.PerSecond = int(float64(len(answers)) / took.Seconds())
	if len(waits) > 0 {
		slices.Sort(waits)
		report.LatencyP50MicroS = waits[len(waits)/2].Microseconds()
		report.LatencyP99MicroS = waits[len(waits)*99/100].Microseconds()
	}
	a.step("%d answered in %v: %d/s, latency p50 %.1f ms, p99 %.1f ms", report.Acked, took.Round(time.Millisecond), report.PerSecond,
		float64(report.LatencyP50MicroS)/1e3, float64(report.LatencyP99MicroS)/1e3)
	return answers, failed
}

// demoProgress shows a live line on a terminal until stopped is closed.
func (a *app) demoProgress(stopped <-chan struct{}, done *atomic.Int64, total int, began time.Time) {
	live := console.IsTerminal(int(os.Stderr.Fd()))
	tick := time.NewTicker(demoTick)
	defer tick.Stop()
	for {
		select {
		case <-stopped:
			if live {
				fmt.Fprint(a.err, "\r\x1b[K")
			}
			return
		case <-tick.C:
			if n := done.Load(); live && n > 0 {
				elapsed := time.Since(began)
				left := time.Duration(float64(elapsed) * float64(int64(total)-n) / float64(n))
				fmt.Fprintf(a.err, "\r\x1b[K   %3d %%  %d of %d  %.0f/s  %v left", n*int64(100)/int64(total), n, total,
					float64(n)/elapsed.Seconds(), left.Round(100*time.Millisecond))
			}
		}
	}
}
