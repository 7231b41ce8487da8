package pit

// reference is a counter as the data sheet describes it, pulse by pulse: an
// independent model to compare the functions of time with. Binary, whole counts.
type reference struct {
	mode         int
	gate, out    bool
	cr           int  // count register; 0 is none written
	ce           int  // counting element
	loaded       bool // ce holds a count
	load         bool // load ce at the next pulse
	running      bool
	fresh        bool // cr was written and not loaded
	strobed      bool // this count's terminal event has happened
	odd, lowHalf bool
}

func (r *reference) control(mode int) {
	*r = reference{mode: mode, gate: r.gate, out: mode != 0}
}

func (r *reference) write(n int) {
	r.fresh, r.cr = true, n
	switch r.mode {
	case 0:
		r.out, r.load = false, true
	case 4:
		r.load = true
	case 2, 3:
		if !r.loaded && !r.load {
			r.load = true
		}
	}
}

func (r *reference) setGate(level bool) {
	rising := level && !r.gate
	r.gate = level
	switch r.mode {
	case 1, 5:
		if rising && r.cr != 0 {
			r.load = true
		}
	case 2, 3:
		if !level {
			r.out = true
		}
		if rising && r.cr != 0 {
			r.load = true
		}
	}
}

func (r *reference) reload() {
	r.ce, r.loaded, r.load, r.fresh, r.running, r.strobed = r.cr, true, false, false, true, false
	if r.odd = r.mode == 3 && r.cr%2 == 1; r.odd {
		r.ce--
	}
}

// pulse is one CLK pulse. It returns whether OUT rose.
func (r *reference) pulse() bool {
	was := r.out
	if r.load {
		r.reload()
		r.lowHalf = false
		switch r.mode {
		case 1:
			r.out = false
		case 5, 4, 2, 3:
			r.out = true
		}
		return r.out && !was
	}
	if !r.running || !r.gate && r.mode != 1 && r.mode != 5 {
		return false
	}
	switch r.mode {
	case 0, 1:
		r.ce--
		if r.ce == 0 {
			r.out = true
		}
	case 2:
		if r.ce--; r.ce == 1 {
			r.out = false
		} else if r.ce == 0 {
			r.reload()
			r.out = true
		}
	case 3:
		// The output changes when the count expires, for an odd count in the high half
		// one pulse later.
		if r.ce -= 2; r.ce == 0 && (!r.odd || r.lowHalf) || r.ce < 0 {
			r.lowHalf = !r.lowHalf
			r.out = !r.lowHalf
			r.reload()
		}
	case 4, 5:
		r.ce--
		r.out = r.ce != 0 || r.strobed
		r.strobed = r.strobed || r.ce == 0
	}
	if r.ce < 0 {
		r.ce += 1 << 16
	}
	return r.out && !was
}
