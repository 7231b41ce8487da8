package rtc

import (
	"time"

	"github.com/ftvmm/ftvmm/devices"
)

// This file relates virtual time to the registers. A function with a parameter from
// returns the first moment after it, or [devices.Never]; from is never before the
// start of the divider chain.

// isTime says that a register is one of the running time.
func isTime(reg uint8) bool {
	switch reg {
	case regSeconds, regMinutes, regHours, regWeekday, regDay, regMonth, regYear, Century:
		return true
	}
	return false
}

// isAlarm says that a register is one of the alarm.
func isAlarm(reg uint8) bool {
	return reg == regSecondsAlarm || reg == regMinutesAlarm || reg == regHoursAlarm
}

// dividing says that the divider chain runs.
func (d *Device) dividing() bool { return d.s.CMOS[regA]&aDivider <= aDividerMax }

// running says that the time is updated.
func (d *Device) running() bool { return d.dividing() && d.s.CMOS[regB]&bSET == 0 }

// now returns virtual time, not before the last look.
func (d *Device) now() int64 { return max(d.clock.Now(), d.s.LookedAt) }

// seconds returns the whole seconds since the divider chain stood at 0.
func (d *Device) seconds(at int64) int64 { return (at - d.s.Divider) / second }

// time returns the time of day while it runs, in seconds since 1970.
func (d *Device) time() int64 { return d.s.Base + d.seconds(d.now()) }

// updateNear says that an update is about to happen.
func (d *Device) updateNear() bool {
	return d.running() && (d.now()-d.s.Divider)%second >= second-uipLead
}

// nextUpdate returns the next update of the time.
func (d *Device) nextUpdate(from int64) int64 {
	if !d.running() {
		return devices.Never
	}
	return d.s.Divider + (d.seconds(from)+1)*second
}

// nextPeriod returns the next tap of the divider chain that sets the periodic flag.
func (d *Device) nextPeriod(from int64) int64 {
	rate := d.s.CMOS[regA] & aRate
	if rate == 0 || !d.dividing() {
		return devices.Never
	}
	if rate <= 2 {
		rate += 7 // with a 32768 Hz crystal, 256 and 128 Hz
	}
	period := uint64(1) << (rate - 1)
	n := devices.ScaleTime(from-d.s.Divider, crystal)/period + 1
	return d.s.Divider + devices.TicksToTime(n*period, crystal)
}

// nextAlarm returns the next update at which the time of day matches the alarm bytes.
// They are compared as the registers stand, bit for bit.
func (d *Device) nextAlarm(from int64) int64 {
	if !d.running() {
		return devices.Never
	}
	const (
		minute = 60
		hour   = 60 * minute
		day    = 24 * hour
	)
	matches := func(reg, v uint8) bool {
		a := d.s.CMOS[reg]
		return a >= alarmAny || a == v
	}
	var hours [24]bool
	var minutes, secs [60]bool
	var anyHour, anyMinute, anySecond bool
	for i := range hours {
		hours[i] = matches(regHoursAlarm, d.encodeHour(i))
		anyHour = anyHour || hours[i]
	}
	for i := range minutes {
		minutes[i] = matches(regMinutesAlarm, d.encode(i))
		secs[i] = matches(regSecondsAlarm, d.encode(i))
		anyMinute, anySecond = anyMinute || minutes[i], anySecond || secs[i]
	}
	if !anyHour || !anyMinute || !anySecond {
		return devices.Never
	}
	// One of the next 86,400 updates matches. Whole hours and minutes that do not are
	// passed over, so the steps are about 24+60+60 at most.
	passed := d.seconds(from)
	now := ((d.s.Base+passed)%day + day) % day
	at := now + 1
	for {
		switch {
		case !hours[at/hour%24]:
			at += hour - at%hour
		case !minutes[at/minute%60]:
			at += minute - at%minute
		case !secs[at%minute]:
			at++
		default:
			return d.s.Divider + (passed+at-now)*second
		}
	}
}

// encode returns a number below 100 as the registers hold it.
func (d *Device) encode(n int) uint8 {
	if d.s.CMOS[regB]&bBinary != 0 {
		return uint8(n)
	}
	return uint8(n/10<<4 | n%10)
}

// decode is the inverse of encode; digits above 9 count for what they are worth.
func (d *Device) decode(v uint8) int {
	if d.s.CMOS[regB]&bBinary != 0 {
		return int(v)
	}
	return int(v>>4)*10 + int(v&0xf)
}

func (d *Device) encodeHour(h int) uint8 {
	if d.s.CMOS[regB]&b24 != 0 {
		return d.encode(h)
	}
	v := d.encode((h+11)%12 + 1)
	if h >= 12 {
		v |= hourPM
	}
	return v
}

func (d *Device) decodeHour(v uint8) int {
	if d.s.CMOS[regB]&b24 != 0 {
		return d.decode(v)
	}
	h := d.decode(v&^hourPM) % 12
	if v&hourPM != 0 {
		h += 12
	}
	return h
}

// fields returns the registers of the time for a time of day. Package time serves as
// the calendar only.
func (d *Device) fields(t int64) (f [Century + 1]uint8) {
	at := time.Unix(t, 0).UTC()
	f[regSeconds] = d.encode(at.Second())
	f[regMinutes] = d.encode(at.Minute())
	f[regHours] = d.encodeHour(at.Hour())
	f[regWeekday] = d.encode((int(at.Weekday())+int(d.s.Weekday))%7 + 1)
	f[regDay] = d.encode(at.Day())
	f[regMonth] = d.encode(int(at.Month()))
	year := ((at.Year())%10000 + 10000) % 10000
	f[regYear] = d.encode(year % 100)
	f[Century] = d.encode(year / 100)
	return f
}

// store puts the registers of the time into the CMOS RAM.
func (d *Device) store(t int64) {
	for i, v := range d.fields(t) {
		if isTime(uint8(i)) {
			d.s.CMOS[i] = v
		}
	}
}

// freeze keeps the running time in the CMOS RAM, where the guest may change it.
func (d *Device) freeze() { d.store(d.time()) }

// thaw lets the time run on from what the CMOS RAM says. Values out of range carry
// into the next field, so that any bytes are some time.
func (d *Device) thaw() {
	r := &d.s.CMOS
	at := time.Date(d.decode(r[Century])*100+d.decode(r[regYear]), time.Month(d.decode(r[regMonth])),
		d.decode(r[regDay]), d.decodeHour(r[regHours]), d.decode(r[regMinutes]), d.decode(r[regSeconds]),
		0, time.UTC)
	d.s.Base = at.Unix() - d.seconds(d.now())
	weekday := d.decode(r[regWeekday]) + 6 // the register counts from 1, Sunday
	d.s.Weekday = uint8((weekday + 7 - int(at.Weekday())) % 7)
}
