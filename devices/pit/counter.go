package pit

// This file is one counter of the 8254. All methods take the present tick t; none may
// be called with an earlier one than the last.

// triggered says that a rising gate, not the write of a count, starts the counter
// (modes 1 and 5); such a counter runs whatever the level of the gate.
func (c *Counter) triggered() bool { return c.Mode == 1 || c.Mode == 5 }

// periodic says that the counter reloads itself (modes 2 and 3).
func (c *Counter) periodic() bool { return c.Mode == 2 || c.Mode == 3 }

// stopped says that a low gate holds the count.
func (c *Counter) stopped() bool { return !c.Gate && !c.triggered() }

// elapsed returns the ticks since the count was loaded; 0 while that is yet to come.
func (c *Counter) elapsed(t uint64) uint64 {
	if c.stopped() {
		return c.Held
	}
	if t < c.Start {
		return 0
	}
	return t - c.Start
}

// modulus is how many values the counting element has: it goes on below 0.
func (c *Counter) modulus() uint64 {
	if c.BCD {
		return 10000
	}
	return 1 << 16
}

// decode turns a count as written into a number of ticks, 0 standing for the
// modulus. Digits above 9 count for what they are worth.
func (c *Counter) decode(v uint16) uint32 {
	n := uint32(v)
	if c.BCD {
		n = n>>12*1000 + n>>8&0xf*100 + n>>4&0xf*10 + n&0xf
	}
	if n == 0 {
		n = uint32(c.modulus())
	}
	return n
}

// encode is the inverse of decode, for a count that is read.
func (c *Counter) encode(n uint64) uint16 {
	n %= c.modulus()
	if c.BCD {
		n = n/1000<<12 | n/100%10<<8 | n/10%10<<4 | n%10
	}
	return uint16(n)
}

// firstHalf returns the ticks of the first half of a cycle of mode 3: the high half is
// the longer one of an odd count.
func (c *Counter) firstHalf() uint64 {
	if c.LowFirst {
		return uint64(c.Count / 2)
	}
	return uint64(c.Count+1) / 2
}

// fold puts a count in use that was written earlier and is due by tick t.
func (c *Counter) fold(t uint64) {
	if c.Next == 0 || !c.periodic() || !c.Armed || c.stopped() || t < c.NextAt {
		return
	}
	if c.Mode == 3 {
		// The new count begins with the half that the old one would have begun. (An
		// old count of 1, which is not legal, was high all the time.)
		endsFirst := (c.NextAt-c.Start)%uint64(c.Count) == c.firstHalf()
		c.LowFirst = c.Count == 1 || endsFirst != c.LowFirst
	}
	c.Count, c.Start, c.Next = c.Next, c.NextAt, 0
}

// boundary returns the next tick after t at which a periodic counter takes a new
// count: the end of a cycle, in mode 3 of a half of one.
func (c *Counter) boundary(t uint64) uint64 {
	if t < c.Start {
		return c.Start
	}
	n := uint64(c.Count)
	phase := (t - c.Start) % n
	begin := t - phase
	if c.Mode == 3 && phase < c.firstHalf() {
		return begin + c.firstHalf()
	}
	return begin + n
}

// out returns the level of the output.
func (c *Counter) out(t uint64) bool {
	c.fold(t)
	e, n := c.elapsed(t), uint64(c.Count)
	running := c.Armed && (c.stopped() || t >= c.Start)
	if c.Armed && t < c.Start && (c.Mode == 1 || c.Mode >= 4) {
		return !c.LowFirst // a new count begins within the pulse of the last
	}
	switch c.Mode {
	case 0:
		return running && e >= n
	case 1:
		return !running || e >= n
	case 2:
		return !running || !c.Gate || n == 1 || e%n != n-1
	case 3:
		return !running || !c.Gate || n == 1 || (e%n < c.firstHalf()) != c.LowFirst
	}
	return !running || e != n // 4 and 5: a strobe of one tick
}

// nextRise returns the first tick after t at which the output rises by itself, or
// never.
func (c Counter) nextRise(t uint64) uint64 {
	c.fold(t)
	r := c.rise(t)
	if r > c.NextAt {
		c.fold(c.NextAt) // a new count comes first, if one waits
		r = c.rise(max(t, c.NextAt))
	}
	return r
}

// rise is nextRise for a counter that keeps its count.
func (c *Counter) rise(t uint64) uint64 {
	if !c.Armed || c.stopped() {
		return never
	}
	n := uint64(c.Count)
	at := c.Start + n // the end of the count
	switch {
	case c.periodic():
		if n == 1 {
			return never // not a legal count; the output stays high
		}
		if c.Mode == 3 && c.LowFirst {
			at = c.Start + c.firstHalf()
		}
		if t >= at {
			at += ((t-at)/n + 1) * n
		}
		return at
	case c.Mode >= 4 && c.LowFirst && t < c.Start:
		at = c.Start // the last strobe ends
	case c.Mode >= 4:
		at++ // the strobe ends
	}
	if at <= t {
		return never
	}
	return at
}

// value returns the counting element as it reads.
func (c *Counter) value(t uint64) uint16 {
	c.fold(t)
	if !c.Armed {
		return c.Idle
	}
	e, n := c.elapsed(t), uint64(c.Count)
	switch c.Mode {
	case 2:
		e %= n
	case 3:
		// Counts down by two in each half, from an even number.
		if e %= n; e >= c.firstHalf() {
			e -= c.firstHalf()
		}
		e, n = 2*e, n&^1
	}
	m := c.modulus()
	return c.encode(n + m - e%m)
}

// null says that a count was written, or is awaited, that is not in the counting
// element yet.
func (c *Counter) null(t uint64) bool {
	c.fold(t)
	return !c.Armed || c.Next != 0 || t < c.Start
}

// control takes a control word.
func (c *Counter) control(t uint64, v uint8) {
	idle := c.value(t)
	*c = Counter{
		Mode: v >> cwMode & 7, Access: v >> cwAccess & 3, BCD: v&cwBCD != 0,
		Gate: c.Gate, Idle: idle,
	}
	if c.Mode > 5 {
		c.Mode -= 4 // modes 2 and 3 have an unused bit
	}
}

// write takes a byte of a count.
func (c *Counter) write(t uint64, v uint8) {
	c.fold(t)
	switch c.Access {
	case accessLow:
		c.load(t, uint16(v))
	case accessHigh:
		c.load(t, uint16(v)<<8)
	default:
		if c.WriteHigh = !c.WriteHigh; c.WriteHigh {
			c.WriteLow = v
			if c.Mode == 0 { // the first byte stops the count and lowers the output
				c.Idle, c.Armed = c.value(t), false
			}
			return
		}
		c.load(t, uint16(v)<<8|uint16(c.WriteLow))
	}
}

// load takes a whole count.
func (c *Counter) load(t uint64, v uint16) {
	n := c.decode(v)
	switch {
	case (c.periodic() || c.triggered()) && c.Armed && t < c.Start:
		c.Count = n // replaces one that was not loaded yet
	case c.triggered() || c.periodic() && c.Armed && c.stopped():
		c.Next = n // for the gate
	case c.periodic() && c.Armed:
		c.Next, c.NextAt = n, c.boundary(t)
	default:
		c.LowFirst = c.Mode == 4 && !c.out(t)
		c.Armed, c.Count, c.Start, c.Held = true, n, t+1, 0
	}
}

// setGate changes the level of the gate.
func (c *Counter) setGate(t uint64, level bool) {
	c.fold(t)
	if level == c.Gate {
		return
	}
	if !level {
		c.Held = c.elapsed(t)
		c.Gate = false
		return
	}
	wasLow := !c.out(t)
	c.Gate = true
	switch {
	case c.triggered() || c.periodic() && c.Armed:
		if c.Next != 0 {
			c.Count, c.Next = c.Next, 0
		}
		if c.Count != 0 {
			c.LowFirst = c.triggered() && wasLow
			c.Armed, c.Start, c.Held = true, t+1, 0
		}
	case c.Armed:
		// Goes on from where it stood, but not before the count is loaded.
		c.Start = max(c.Start, t-min(t, c.Held))
	}
}

// latch keeps the count for reading (counter latch command), unless one is kept.
func (c *Counter) latch(t uint64) {
	if c.LatchedBytes != 0 {
		return
	}
	c.Latched, c.LatchedBytes = c.value(t), 1
	if c.Access == accessBoth {
		c.LatchedBytes = 2
	}
}

// readBack performs the read-back command.
func (c *Counter) readBack(t uint64, cmd uint8) {
	if cmd&rbNoCount == 0 {
		c.latch(t)
	}
	if cmd&rbNoStatus == 0 && !c.StatusLatched {
		c.StatusLatched = true
		c.Status = c.Access<<accessShift | c.Mode<<cwMode
		if c.BCD {
			c.Status |= cwBCD
		}
		if c.out(t) {
			c.Status |= statusOut
		}
		if c.null(t) {
			c.Status |= statusNull
		}
	}
}

// read returns the byte that is next: of the latched status, of the latched count, or
// of the running one.
func (c *Counter) read(t uint64) uint8 {
	if c.StatusLatched {
		c.StatusLatched = false
		return c.Status
	}
	var v uint16
	high := c.Access == accessHigh
	if c.LatchedBytes != 0 {
		v = c.Latched
		c.LatchedBytes--
		if c.Access == accessBoth {
			high = c.LatchedBytes == 0
		}
	} else {
		v = c.value(t)
		if c.Access == accessBoth {
			high = c.ReadHigh
			c.ReadHigh = !high
		}
	}
	if high {
		v >>= 8
	}
	return uint8(v)
}
