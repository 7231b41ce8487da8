package protocol_test

import (
	"fmt"
	"math"
	"slices"
	"testing"

	"github.com/stretchr/testify/require"
	"pgregory.net/rapid"

	"github.com/ftvmm/ftvmm/lockstep/protocol"
)

// allTypes are the types of message that there are.
func allTypes() []protocol.Type {
	var types []protocol.Type
	for t := protocol.MsgHello; t <= protocol.MsgHandOver; t++ {
		types = append(types, t)
	}
	return types
}

func drawPoint(t *rapid.T) protocol.Point {
	return protocol.Point{Exit: rapid.Uint64().Draw(t, "exit"), Round: rapid.Uint32().Draw(t, "round")}
}

func drawData(t *rapid.T) []byte {
	if b := rapid.SliceOfN(rapid.Byte(), 0, 300).Draw(t, "data"); len(b) > 0 {
		return b
	}
	return nil
}

func drawDigest(t *rapid.T) (d protocol.Digest) {
	copy(d[:], rapid.SliceOfN(rapid.Byte(), len(d), len(d)).Draw(t, "digest"))
	return d
}

func drawItem(t *rapid.T) protocol.Item {
	i := protocol.Item{Point: drawPoint(t), Mark: rapid.Bool().Draw(t, "mark")}
	if i.Mark {
		i.Digest, i.Tainted = drawDigest(t), rapid.Bool().Draw(t, "tainted")
	} else {
		i.Data = drawData(t)
	}
	return i
}

func drawOutput(t *rapid.T) protocol.Output {
	return protocol.Output{Seq: rapid.Uint64().Draw(t, "seq"), Point: drawPoint(t), Data: drawData(t)}
}

// drawMessage draws a message with the fields that the comment at its type names.
func drawMessage(t *rapid.T) protocol.Message {
	side := rapid.SampledFrom([]protocol.Side{protocol.A, protocol.B})
	m := protocol.Message{Type: rapid.SampledFrom(allTypes()).Draw(t, "type"), From: side.Draw(t, "from")}
	switch m.Type {
	case protocol.MsgLog, protocol.MsgAck, protocol.MsgDiverged, protocol.MsgCutAsk, protocol.MsgCutDirty,
		protocol.MsgCutState, protocol.MsgCutWant, protocol.MsgCutPages, protocol.MsgCutAck:
		m.Term = rapid.Uint64().Draw(t, "term")
	}
	switch m.Type {
	case protocol.MsgChunk, protocol.MsgCutDirty, protocol.MsgCutState, protocol.MsgCutWant, protocol.MsgCutPages:
		m.Data = drawData(t)
	}
	switch m.Type {
	case protocol.MsgHello:
		m.Phase = protocol.Phase(rapid.IntRange(0, int(protocol.Switching)).Draw(t, "phase"))
		m.Epoch = rapid.Uint64().Draw(t, "epoch")
	case protocol.MsgJoin:
		m.Epoch = rapid.Uint64().Draw(t, "epoch")
	case protocol.MsgLog:
		for range rapid.IntRange(0, 20).Draw(t, "items") {
			m.Items = append(m.Items, drawItem(t))
		}
	case protocol.MsgAck:
		m.Received, m.Executed, m.Clean = drawPoint(t), drawPoint(t), drawPoint(t)
		m.Tainted = rapid.Bool().Draw(t, "tainted")
	case protocol.MsgReleased:
		m.Seq = rapid.Uint64().Draw(t, "seq")
	case protocol.MsgDiverged:
		m.Point, m.Digest = drawPoint(t), drawDigest(t)
	case protocol.MsgCutState:
		m.Seq = rapid.Uint64().Draw(t, "seq")
		for range rapid.IntRange(0, 20).Draw(t, "outputs") {
			m.Outputs = append(m.Outputs, drawOutput(t))
		}
	case protocol.MsgCutPages:
		m.Last = rapid.Bool().Draw(t, "last")
	case protocol.MsgInSync, protocol.MsgHandOver:
		m.Record = protocol.Record{
			Epoch: rapid.Uint64().Draw(t, "epoch"), Nonce: rapid.Uint64().Draw(t, "nonce"),
			InSync:  rapid.SampledFrom([]protocol.Sides{0, protocol.Only(protocol.A), protocol.Only(protocol.B), protocol.Both}).Draw(t, "sides"),
			Primary: rapid.SampledFrom([]protocol.Side{protocol.None, protocol.A, protocol.B}).Draw(t, "primary"),
		}
	}
	return m
}

func TestMessageComesBackAsItWas(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := drawMessage(t)
		prefix := []byte("prefix")
		b := m.Append(slices.Clip(prefix))
		require.Equal(t, prefix, b[:len(prefix)])
		b = b[len(prefix):]
		got, err := protocol.DecodeMessage(b)
		require.NoError(t, err)
		require.Equal(t, m, got)
		require.Equal(t, b, m.Append(nil), "the encoding is a function of the message")

		_, err = protocol.DecodeMessage(append(slices.Clip(b), 0))
		if n := len(m.Data); n == 0 && !slices.Contains([]protocol.Type{
			protocol.MsgChunk, protocol.MsgCutDirty, protocol.MsgCutState, protocol.MsgCutWant, protocol.MsgCutPages,
		}, m.Type) {
			require.ErrorIs(t, err, protocol.ErrMessage, "a byte too many")
			for n := range b {
				_, err := protocol.DecodeMessage(b[:n])
				require.ErrorIs(t, err, protocol.ErrMessage, "%d bytes of %d", n, len(b))
			}
		}
	})
}

func TestOnlyTheFieldsOfTheTypeTravel(t *testing.T) {
	full := protocol.Message{
		From: protocol.A, Phase: protocol.Backup, Epoch: 1, Term: 2, Items: []protocol.Item{{Data: []byte{1}}},
		Received: protocol.Point{Exit: 3}, Executed: protocol.Point{Exit: 2}, Clean: protocol.Point{Exit: 1}, Tainted: true,
		Seq: 4, Point: protocol.Point{Exit: 5}, Digest: protocol.Digest{6}, Data: []byte{7}, Last: true,
		Outputs: []protocol.Output{{Seq: 8}}, Record: protocol.Record{Epoch: 9, InSync: protocol.Both},
	}
	for _, c := range []struct {
		kind protocol.Type
		want protocol.Message
	}{
		{protocol.MsgHello, protocol.Message{Phase: full.Phase, Epoch: 1}},
		{protocol.MsgHeartbeat, protocol.Message{}},
		{protocol.MsgJoin, protocol.Message{Epoch: 1}},
		{protocol.MsgReady, protocol.Message{}},
		{protocol.MsgChunk, protocol.Message{Data: full.Data}},
		{protocol.MsgLog, protocol.Message{Term: 2, Items: full.Items}},
		{protocol.MsgAck, protocol.Message{Term: 2, Received: full.Received, Executed: full.Executed, Clean: full.Clean, Tainted: true}},
		{protocol.MsgReleased, protocol.Message{Seq: 4}},
		{protocol.MsgDiverged, protocol.Message{Term: 2, Point: full.Point, Digest: full.Digest}},
		{protocol.MsgCutAsk, protocol.Message{Term: 2}},
		{protocol.MsgCutDirty, protocol.Message{Term: 2, Data: full.Data}},
		{protocol.MsgCutState, protocol.Message{Term: 2, Data: full.Data, Outputs: full.Outputs, Seq: 4}},
		{protocol.MsgCutWant, protocol.Message{Term: 2, Data: full.Data}},
		{protocol.MsgCutPages, protocol.Message{Term: 2, Data: full.Data, Last: true}},
		{protocol.MsgCutAck, protocol.Message{Term: 2}},
		{protocol.MsgInSync, protocol.Message{Record: full.Record}},
		{protocol.MsgHandOver, protocol.Message{Record: full.Record}},
	} {
		t.Run(c.kind.String(), func(t *testing.T) {
			m, want := full, c.want
			m.Type, want.Type, want.From = c.kind, c.kind, protocol.A
			got, err := protocol.DecodeMessage(m.Append(nil))
			require.NoError(t, err)
			require.Equal(t, want, got)
		})
	}
}

func TestMessagesOfTheHotPathAreShort(t *testing.T) {
	entry := func(exit uint64) protocol.Item {
		return protocol.Item{Point: protocol.Point{Exit: exit}, Data: make([]byte, 5)}
	}
	log := protocol.Message{Type: protocol.MsgLog, From: protocol.A, Term: 1, Items: []protocol.Item{entry(100), entry(101), entry(103)}}
	require.Len(t, log.Append(nil), 3+3*(3+5))
	ack := protocol.Message{Type: protocol.MsgAck, From: protocol.B, Term: 1, Received: protocol.Point{Exit: 1 << 20}, Executed: protocol.Point{Exit: 1<<20 - 3}, Clean: protocol.Point{Exit: 1<<20 - 3}}
	require.Len(t, ack.Append(nil), 2+3+5)

	buf := make([]byte, 0, 4096)
	b, a := log.Append(nil), ack.Append(nil)
	require.Zero(t, testing.AllocsPerRun(100, func() { log.Append(buf) }))
	require.Zero(t, testing.AllocsPerRun(100, func() { ack.Append(buf) }))
	require.EqualValues(t, 1, testing.AllocsPerRun(100, func() { protocol.DecodeMessage(b) }), "the slice of items")
	require.Zero(t, testing.AllocsPerRun(100, func() { protocol.DecodeMessage(a) }))
}

func TestMalformedMessagesAreRefused(t *testing.T) {
	const fromA = 1 << 5
	huge := []byte{0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x01}
	log := func(b ...byte) []byte { return append([]byte{fromA | byte(protocol.MsgLog), 1}, b...) }
	for name, b := range map[string][]byte{
		"nothing":                    {},
		"type 0":                     {fromA},
		"a type after the last":      {fromA | byte(protocol.MsgHandOver+1)},
		"from nobody":                {byte(protocol.MsgHeartbeat)},
		"from side 3":                {3<<5 | byte(protocol.MsgHeartbeat)},
		"a flag where there is none": {0x80 | fromA | byte(protocol.MsgHeartbeat)},
		"a phase after the last":     {fromA | byte(protocol.MsgHello), byte(protocol.Switching + 1), 0},
		"a number cut short":         {fromA | byte(protocol.MsgReleased), 0x80},
		"a number of 65 bits":        {fromA | byte(protocol.MsgReleased), 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0x02},
		"a number in a longer form":  {fromA | byte(protocol.MsgReleased), 0x80, 0},
		"a round of 33 bits":         append([]byte{fromA | byte(protocol.MsgDiverged), 1, 1, 0x80, 0x80, 0x80, 0x80, 0x10}, make([]byte, 16)...),
		"more items than bytes":      log(append(huge, 0)...),
		"items of less than 3 bytes": log(2, 0, 1, 0, 0, 1),
		"an item's flag":             log(1, 8, 1, 0),
		"a tainted entry":            log(1, 2, 1, 0),
		"round 0 in long form":       log(1, 4, 1, 0, 0),
		"an item's data cut short":   log(1, 0, 1, 2, 0),
		"an endless item":            log(append([]byte{1, 0, 1}, huge...)...),
		"half a digest":              log(1, 1, 1, 0, 0, 0),
		"more outputs than bytes":    append([]byte{fromA | byte(protocol.MsgCutState), 1, 1}, huge...),
		"an endless output":          append([]byte{fromA | byte(protocol.MsgCutState), 1, 1, 1, 0, 0, 0}, huge...),
		"a record's sides":           {fromA | byte(protocol.MsgInSync), 1, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0},
		"a record's primary":         {fromA | byte(protocol.MsgInSync), 1, 2, 3, 0, 0, 0, 0, 0, 0, 0, 0},
		"a longer message":           make([]byte, protocol.MaxMessage+1),
	} {
		t.Run(name, func(t *testing.T) {
			m, err := protocol.DecodeMessage(b)
			require.ErrorIs(t, err, protocol.ErrMessage)
			require.Zero(t, m)
		})
	}
	unknown := protocol.Message{Type: 33, From: protocol.A}
	_, err := protocol.DecodeMessage(unknown.Append(nil))
	require.ErrorIs(t, err, protocol.ErrMessage, "not taken for type 1")
}

func TestLimitsOfCounts(t *testing.T) {
	log := protocol.Message{Type: protocol.MsgLog, From: protocol.A, Items: make([]protocol.Item, protocol.MaxItems)}
	got, err := protocol.DecodeMessage(log.Append(nil))
	require.NoError(t, err)
	require.Len(t, got.Items, protocol.MaxItems)
	log.Items = append(log.Items, protocol.Item{})
	_, err = protocol.DecodeMessage(log.Append(nil))
	require.ErrorIs(t, err, protocol.ErrMessage)

	cut := protocol.Message{Type: protocol.MsgCutState, From: protocol.A, Outputs: make([]protocol.Output, protocol.MaxOutputs)}
	got, err = protocol.DecodeMessage(cut.Append(nil))
	require.NoError(t, err)
	require.Len(t, got.Outputs, protocol.MaxOutputs)
	cut.Outputs = append(cut.Outputs, protocol.Output{})
	_, err = protocol.DecodeMessage(cut.Append(nil))
	require.ErrorIs(t, err, protocol.ErrMessage)
}

func TestLongLogIsSplit(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		m := protocol.Message{Type: protocol.MsgLog, From: protocol.B, Term: math.MaxUint64}
		for range rapid.IntRange(0, 50).Draw(t, "items") {
			m.Items = append(m.Items, drawItem(t))
		}
		const limit = 1000 // more than any item
		var items []protocol.Item
		for _, part := range m.Split(limit) {
			require.LessOrEqual(t, len(part.Append(nil)), limit)
			require.Equal(t, m.Term, part.Term)
			require.Equal(t, m.From, part.From)
			require.Equal(t, m.Type, part.Type)
			items = append(items, part.Items...)
		}
		require.Equal(t, m.Items, items)
	})
	many := protocol.Message{Type: protocol.MsgLog, Items: make([]protocol.Item, protocol.MaxItems+1)}
	require.Len(t, many.Split(math.MaxInt), 2)
	wide := protocol.Message{Type: protocol.MsgLog, Items: []protocol.Item{{}, {Data: make([]byte, 2000)}, {}}}
	require.Len(t, wide.Split(1000), 3)
	other := protocol.Message{Type: protocol.MsgChunk, Data: make([]byte, 2000)}
	require.Equal(t, []protocol.Message{other}, other.Split(1000))
}

// FuzzDecodeMessage requires that what is taken has no other encoding.
func FuzzDecodeMessage(f *testing.F) {
	point := protocol.Point{Exit: 300, Round: 2}
	for _, t := range allTypes() {
		m := protocol.Message{
			Type: t, From: protocol.B, Phase: protocol.Backup, Epoch: 3, Term: 5,
			Items:    []protocol.Item{{Point: point, Data: []byte("entry")}, {Point: point, Mark: true, Tainted: true, Digest: protocol.Digest{1, 2}}},
			Received: point, Executed: point, Clean: protocol.Point{Exit: 299}, Tainted: true, Seq: 1 << 40, Point: point,
			Data: []byte("data"), Last: true, Outputs: []protocol.Output{{Seq: 7, Point: point, Data: []byte("out")}, {Seq: 8}},
			Record: protocol.Record{Epoch: 4, InSync: protocol.Both, Primary: protocol.A, Nonce: 1 << 63},
		}
		f.Add(m.Append(nil))
	}
	f.Add([]byte{})
	f.Add(fmt.Append(nil, "no message at all"))
	f.Fuzz(func(t *testing.T, b []byte) {
		m, err := protocol.DecodeMessage(b)
		if err != nil {
			require.ErrorIs(t, err, protocol.ErrMessage)
			return
		}
		require.Equal(t, b, m.Append([]byte{}))
		_ = m.String()
	})
}
