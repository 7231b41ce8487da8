package selftest

import (
	"context"
	"encoding/binary"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"

	"github.com/stretchr/testify/require"
	"gvisor.dev/gvisor/pkg/tcpip/header"

	"github.com/ftvmm/ftvmm/devices/virtio/net"
	"github.com/ftvmm/ftvmm/integration/guests"
	"github.com/ftvmm/ftvmm/vmm"
	"github.com/ftvmm/ftvmm/vmm/kvm"
)

// requireComplete checks that a row says all that a user needs.
func requireComplete(t *testing.T, r *Row) {
	t.Helper()
	require.Contains(t, severity, r.State, "%+v", r)
	require.NotEmpty(t, r.Code, "%+v", r)
	require.NotEmpty(t, r.Found, "%+v", r)
	require.NotEmpty(t, r.Meaning, "%+v", r)
	if severity[r.State] >= severity[Warning] {
		require.NotEmpty(t, r.Remedy, "%+v", r)
	}
}

// On this host guests run twice and are the same.
func TestThisHostPasses(t *testing.T) {
	var names []string
	part := 0.0
	rows, err := Run(t.Context(), &Env{Seed: 1, Quick: true}, append(Host(), Guests()...), func(p Progress) {
		require.Equal(t, len(names), p.Done)
		require.GreaterOrEqual(t, p.Part, part)
		require.Less(t, p.Part, 1.0)
		part = p.Part
		names = append(names, p.Next)
	})
	require.NoError(t, err)
	require.Len(t, rows, len(names))
	for i := range rows {
		r := &rows[i]
		t.Logf("%s %s %s (%d ms): %s", r.State, r.Check, r.Code, r.Elapsed, r.Found)
		require.Equal(t, names[i], r.Check)
		requireComplete(t, r)
		require.NotEqual(t, Error, r.State)
		if r.Compare == nil {
			continue
		}
		require.Nil(t, r.Divergence)
		require.Equal(t, 2, r.Compare.Runs)
		require.NotZero(t, r.Compare.Exits)
		require.Greater(t, r.Compare.Memory, uint64(guestMemory-1<<20), "RAM, less the hole below 1 MiB")
		require.NotZero(t, r.Compare.Components)
		require.NotEmpty(t, r.Compare.Digest)
	}
	require.NotZero(t, find(rows, "guest.blk").Compare.Inputs)
	require.GreaterOrEqual(t, find(rows, "guest.net").Compare.Inputs, uint64(peerEchoes))
	require.NotZero(t, find(rows, "guest.timers").Compare.Clocks)
	require.NotZero(t, find(rows, "guest.storm-cpl0").Compare.Kicks)
	v := Conclude(rows)
	require.Equal(t, EngineLockstep, v.Engine.Value, "%+v", v)
	if find(rows, checkCounter).State == Good {
		require.NotZero(t, find(rows, checkLanding).Compare.Landings)
		require.Equal(t, CommitReceived, v.Commit.Value, "%+v", v)
	}
}

// What is broken in one of two runs on purpose is found, at its place and with both values.
func TestFaultsAreFound(t *testing.T) {
	check := func(name string) Check {
		for _, c := range append(Host(), Guests()...) {
			if c.Name == name {
				return c
			}
		}
		t.Fatalf("no check %q", name)
		return Check{}
	}
	for _, c := range []struct {
		fault          Fault
		what           string
		first, second  string // regular expressions
		atEnd, landing bool
	}{
		// "unbroken" is written as "unbrokeo", character by character.
		{fault: FaultMemory, what: "what the exit is about", first: "OUT addr=0x3f8 size=1 data=0x6f ", second: "OUT addr=0x3f8 size=1 data=0x6e "},
		{fault: FaultHidden, what: "memory at 0x1ffffff", first: "^0x01$", second: "^0x00$", atEnd: true},
		{fault: FaultTime, what: "what the exit is about", first: "IN addr=0x608", second: "IN addr=0x608"},
		{fault: FaultLanding, what: "an asynchronous stop is not reached", first: "a stop at .* rip", second: "does not reach", landing: true},
	} {
		t.Run(string(c.fault), func(t *testing.T) {
			e := &Env{Seed: 2, Quick: true, Inject: c.fault}
			guest := guestPrefix + faulty[c.fault]
			rows, err := Run(t.Context(), e, []Check{check(checkDirtyLog), check(checkCounter), check(guest)}, nil)
			require.NoError(t, err)
			r := &rows[2]
			if c.landing && e.counter == vmm.CounterNone {
				t.Skip("this host has no counter to land by")
			}
			requireComplete(t, r)
			require.Equal(t, Error, r.State, "%+v", r)
			require.Equal(t, "divergence", r.Code)
			d := r.Divergence
			require.NotNil(t, d)
			t.Logf("%s\n%+v", r.Found, d)
			require.Equal(t, guest, guestPrefix+d.Guest)
			require.Contains(t, d.What, c.what)
			require.Regexp(t, c.first, d.First)
			require.Regexp(t, c.second, d.Second)
			require.NotEqual(t, d.First, d.Second)
			pos, err := vmm.ParsePosition(d.Position)
			require.NoError(t, err)
			require.NotZero(t, pos.Exit)
			if c.atEnd {
				require.Equal(t, r.Compare.Exits, pos.Exit)
			} else {
				require.LessOrEqual(t, pos.Exit, r.Compare.Exits)
			}
			require.Contains(t, r.Found, "exit "+d.Position)
		})
	}
}

// A guest that is not content with the machine, and one that does not end, are told apart from a divergence.
func TestGuestsThatDoNotRun(t *testing.T) {
	e := &Env{Quick: true}
	row := e.compareRuns(t.Context(), &guest{name: "storm", image: "storm", cmdline: "mode=hail"}, 1)
	requireComplete(t, &row)
	require.Equal(t, Error, row.State)
	require.Equal(t, "guest-fails", row.Code)
	require.Contains(t, row.Found, "debug-exit 1")

	e.patience = 100 * time.Millisecond
	row = e.compareRuns(t.Context(), &guest{name: "spin", image: "spin", cmdline: "n=1000"}, 1)
	requireComplete(t, &row)
	require.Equal(t, Unknown, row.State)
	require.Equal(t, "guest-timeout", row.Code)

	e.patience = 0
	row = e.compareRuns(t.Context(), &guest{name: "no such"}, 1)
	requireComplete(t, &row)
	require.Equal(t, "guest-broken", row.Code)

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	row = e.compareRuns(ctx, &guest{name: "spin", image: "spin"}, 1)
	require.Equal(t, "interrupted", row.Code)

	row = e.compare(t.Context(), &guest{landing: true}, 1)
	requireComplete(t, &row)
	require.Equal(t, "landing-no-counter", row.Code)
}

// Without KVM every check that needs it has a row that says so, and Open says why.
func TestNoKVM(t *testing.T) {
	device := filepath.Join(t.TempDir(), "kvm")
	require.ErrorIs(t, Open(device), kvm.ErrNoKVM)
	rows, err := Run(t.Context(), &Env{KVM: device, Quick: true}, append(Host(), Guests()...), nil)
	require.NoError(t, err)
	for i := range rows {
		requireComplete(t, &rows[i])
		switch rows[i].Check {
		case checkKind, checkNested:
		default:
			require.NotEqual(t, Good, rows[i].State, "%+v", rows[i])
		}
	}
	v := Conclude(rows)
	require.Equal(t, EngineNone, v.Engine.Value)
	require.Equal(t, Impossible, v.Levels[0].Value)
}

// An interrupted check ends between two rows.
func TestInterrupted(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	checks := []Check{
		{Name: "one", Run: func(context.Context, *Env) Row { cancel(); return Row{State: Good} }},
		{Name: "two", Run: func(context.Context, *Env) Row { panic("not reached") }},
	}
	rows, err := Run(ctx, &Env{}, checks, nil)
	require.ErrorIs(t, err, context.Canceled)
	require.Len(t, rows, 1)
	require.Equal(t, "one", rows[0].Check)
}

// rowsOf is a host where all is well.
func rowsOf() []Row {
	rows := []Row{
		{Check: checkDirtyLog, State: Good, Code: "dirty-log-exact"},
		{Check: checkTSC, State: Good, Code: "tsc-scaled"},
		{Check: checkCounter, State: Good, Code: "counter-emulated", Value: "emulated"},
	}
	for _, name := range basics {
		rows = append(rows, Row{Check: name, State: Good})
	}
	for _, g := range allGuests {
		rows = append(rows, Row{Check: guestPrefix + g.name, State: Good, Compare: &Count{Exits: 10}})
	}
	return rows
}

// What follows from the rows, case by case.
func TestConclude(t *testing.T) {
	const counterNone = string(vmm.CounterNone)
	for _, c := range []struct {
		name                    string
		check                   string // the row that is otherwise; "guests": they have not run
		state                   State
		code                    string
		counter, commit, engine string
		levels                  [3]string
	}{
		{"all good", "", Good, "", "emulated", CommitReceived, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"no counter", checkCounter, Warning, "counter-none", counterNone, CommitExecuted, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"landings fail", checkLanding, Error, "divergence", counterNone, CommitExecuted, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"no landing came", checkLanding, Unknown, "landings-none", counterNone, CommitExecuted, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"native TSC", checkTSC, Warning, "tsc-native", "emulated", CommitReceived, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"a guest parts", "guest.blk", Error, "divergence", "emulated", CommitExecuted, EngineCheckpoint, [3]string{Possible, Possible, Possible}},
		{"a guest is late", "guest.blk", Unknown, "guest-timeout", "emulated", CommitExecuted, EngineUnknown, [3]string{Possible, Possible, NotKnown}},
		{"a guest fails", "guest.irq", Error, "guest-fails", "emulated", CommitExecuted, EngineNone, [3]string{Impossible, Impossible, Impossible}},
		{"pages are missed", checkDirtyLog, Error, "dirty-log-misses", "emulated", CommitExecuted, EngineNone, [3]string{Possible, Possible, Impossible}},
		{"pages too many", checkDirtyLog, Warning, "dirty-log-extra", "emulated", CommitReceived, EngineLockstep, [3]string{Possible, Possible, Possible}},
		{"no filter", checkMSRs, Error, "msr-filter-fails", "emulated", CommitExecuted, EngineNone, [3]string{Impossible, Impossible, Impossible}},
		{"no guests", "guests", Good, "", "emulated", CommitExecuted, EngineUnknown, [3]string{Possible, Possible, NotKnown}},
	} {
		t.Run(c.name, func(t *testing.T) {
			rows := rowsOf()
			if c.check == "guests" {
				rows = rows[:len(rows)-len(allGuests)]
			} else if c.check != "" {
				r := find(rows, c.check)
				r.State, r.Code, r.Found = c.state, c.code, "the finding"
			}
			v := Conclude(rows)
			require.Equal(t, c.counter, v.Counter.Value)
			require.Equal(t, c.commit, v.Commit.Value)
			require.Equal(t, c.engine, v.Engine.Value)
			require.Len(t, v.Levels, MaxLevel)
			for i, l := range v.Levels {
				require.Equal(t, c.levels[i], l.Value, "level %d", i+1)
			}
			named := false
			for _, a := range append(v.Levels, v.Counter, v.Commit, v.Engine) {
				require.NotEmpty(t, a.Reasons)
				for _, reason := range a.Reasons {
					named = named || c.code != "" && regexp.MustCompile(regexp.QuoteMeta(c.check)).MatchString(reason)
				}
			}
			if c.code != "" && c.check != checkTSC { // which changes nothing: no KVM traps RDTSC
				require.True(t, named, "no reason names %s: %+v", c.check, v)
			}
		})
	}
}

// A log of written pages is compared in both directions.
func TestJudge(t *testing.T) {
	for _, c := range []struct {
		bitmap              []uint64
		writes, miss, extra []int
	}{
		{bitmap: []uint64{0, 0}},
		{bitmap: []uint64{1 << 5, 1}, writes: []int{64, 5}},
		{bitmap: []uint64{1 << 5, 0}, writes: []int{64, 5}, miss: []int{64}},
		{bitmap: []uint64{1<<5 | 1<<4, 1 << 63}, writes: []int{5}, extra: []int{4, 127}},
		{bitmap: []uint64{1}, writes: []int{63, 62}, miss: []int{62, 63}, extra: []int{0}},
	} {
		missed, extra := judge(c.bitmap, c.writes)
		require.Equal(t, c.miss, missed)
		require.Equal(t, c.extra, extra)
	}
	require.Equal(t, "in round 2, 1 of 2 written pages are not reported, the first 0x1003000", (&missedPages{2, 2, 1, 3}).Error())
}

// The states of vCPU and devices are compared, too: two machines whose clocks began at different times differ there.
func TestStatesAreCompared(t *testing.T) {
	kernel, err := guests.Image("first")
	require.NoError(t, err)
	var machines [3]*vmm.Machine
	for i, year := range [...]int{2000, 2000, 2001} {
		machines[i], err = vmm.New(vmm.Config{Memory: 16 << 20, Kernel: kernel, Epoch: time.Date(year, 1, 1, 0, 0, 0, 0, time.UTC)})
		require.NoError(t, err)
		defer machines[i].Close()
	}
	var count Count
	d, err := compareState(machines[0], machines[1], &count)
	require.NoError(t, err)
	require.Nil(t, d)
	require.NotZero(t, count.Components)
	d, err = compareState(machines[0], machines[2], &count)
	require.NoError(t, err)
	require.NotNil(t, d)
	require.Contains(t, d.What, "device rtc")
	require.NotEqual(t, d.First, d.Second)
	require.Nil(t, compareMemory(machines[0], machines[1], &count))
}

func TestShorten(t *testing.T) {
	for _, c := range []struct{ first, second, want string }{
		{"IN addr=1 size=1 data=2 rip=3", "IN addr=1 size=1 data=4 rip=3", "IN addr=1 data=2 | IN addr=1 data=4"},
		{"nothing more", "the guest reads a clock", "nothing more | the guest reads a clock"},
		{"0x01", "0x00", "0x01 | 0x00"},
	} {
		require.Equal(t, c.want, shorten(c.first, c.second))
	}
}

// The frames that the network's peer sends are what they claim to be.
func TestPeerFrames(t *testing.T) {
	f := datagram(echoPort, []byte("payload"))
	require.EqualValues(t, 1, binary.LittleEndian.Uint16(f[numBuffersAt:]))
	require.Equal(t, header.IPv4ProtocolNumber, header.Ethernet(f[net.HeaderSize:]).Type())
	ip := header.IPv4(f[packetAt:])
	require.True(t, ip.IsValid(len(ip)))
	require.True(t, ip.IsChecksumValid())
	u := header.UDP(ip.Payload())
	require.EqualValues(t, echoPort, u.DestinationPort())
	require.Equal(t, "payload", string(u.Payload()))
}

// Every code of a row, and every check, is explained in docs/check.md.
func TestCodesAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/check.md")
	require.NoError(t, err)
	files, err := filepath.Glob("*.go")
	require.NoError(t, err)
	code := regexp.MustCompile(`(?:Code: |row\.Code(?:, row\.\w+)? = |broken\()"([a-z-]+[a-z])"`)
	found := 0
	for _, name := range files {
		if regexp.MustCompile(`_test\.go$`).MatchString(name) {
			continue
		}
		b, err := os.ReadFile(name)
		require.NoError(t, err)
		for _, m := range code.FindAllStringSubmatch(string(b), -1) {
			found++
			require.Contains(t, string(doc), "`"+m[1]+"`", name)
		}
	}
	require.Greater(t, found, 30)
	for _, c := range append(Host(), Guests()...) {
		require.Contains(t, string(doc), "`"+c.Name+"`")
	}
}
