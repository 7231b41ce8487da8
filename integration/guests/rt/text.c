/* Strings, printf on COM1, and the claims that guests make. */
#include "rt.h"

void *memcpy(void *to, const void *from, size_t n)
{
	void *d = to;

	__asm__ volatile("rep movsb" : "+D"(d), "+S"(from), "+c"(n) : : "memory");
	return to;
}

void *memset(void *to, int c, size_t n)
{
	void *d = to;

	__asm__ volatile("rep stosb" : "+D"(d), "+c"(n) : "a"(c) : "memory");
	return to;
}

void *memmove(void *to, const void *from, size_t n)
{
	u8 *d = to;
	const u8 *s = from;

	if (d <= s || d >= s + n)
		return memcpy(to, from, n);
	while (n--) {
		d[n] = s[n];
		barrier(); /* or GCC makes a call to memmove of it */
	}
	return to;
}

int memcmp(const void *a, const void *b, size_t n)
{
	const u8 *p = a, *q = b;

	for (; n; n--, p++, q++)
		if (*p != *q)
			return *p - *q;
	return 0;
}

size_t strlen(const char *s)
{
	size_t n = 0;

	while (s[n]) {
		n++;
		barrier(); /* or GCC makes a call to strlen of it */
	}
	return n;
}

int strcmp(const char *a, const char *b)
{
	while (*a && *a == *b)
		a++, b++;
	return (u8)*a - (u8)*b;
}

int strncmp(const char *a, const char *b, size_t n)
{
	for (; n; n--, a++, b++)
		if (*a != *b || !*a)
			return (u8)*a - (u8)*b;
	return 0;
}

u64 fnv1a(u64 hash, const void *data, size_t n)
{
	const u8 *p = data;

	while (n--)
		hash = (hash ^ *p++) * 0x100000001b3ul;
	return hash;
}

/* ---- COM1 ---- */

#define COM1 0x3f8
#define COM_IER 1
#define COM_FCR 2
#define COM_LCR 3
#define COM_MCR 4
#define COM_LSR 5
#define LSR_THRE 0x20
#define COM_FIFO 16

static char line[256];
static u32 line_length;
static bool com_ready;

/* One poll of LSR for each FIFO's worth. */
void console_flush(void)
{
	if (!com_ready) {
		outb(COM1 + COM_IER, 0);
		outb(COM1 + COM_LCR, 3);
		outb(COM1 + COM_FCR, 7);
		outb(COM1 + COM_MCR, 0x0b); /* DTR, RTS, and OUT2, which gates the interrupt */
		com_ready = true;
	}
	for (u32 i = 0; i < line_length; i++) {
		if (i % COM_FIFO == 0)
			while (!(inb(COM1 + COM_LSR) & LSR_THRE))
				;
		outb(COM1, line[i]);
	}
	line_length = 0;
}

static void console_char(char c)
{
	line[line_length++] = c;
	if (c == '\n' || line_length == sizeof line)
		console_flush();
}

/* ---- printf ---- */

struct sink {
	char *to; /* NULL: the console */
	size_t size, n;
};

static void put(struct sink *s, char c)
{
	if (!s->to)
		console_char(c);
	else if (s->n + 1 < s->size)
		s->to[s->n] = c;
	s->n++;
}

static void put_padded(struct sink *s, const char *text, size_t n, int width, bool left, char pad)
{
	for (int i = n; !left && i < width; i++)
		put(s, pad);
	for (size_t i = 0; i < n; i++)
		put(s, text[i]);
	for (int i = n; left && i < width; i++)
		put(s, ' ');
}

static void format_to(struct sink *s, const char *f, va_list ap)
{
	for (; *f; f++) {
		bool left = false, alternate = false, negative = false;
		char pad = ' ', digits[24];
		int width = 0, wide = 0;
		u64 v, base = 10;
		const char *text;
		size_t n;

		if (*f != '%') {
			put(s, *f);
			continue;
		}
		for (f++; *f == '-' || *f == '0' || *f == '#'; f++) {
			left |= *f == '-';
			alternate |= *f == '#';
			if (*f == '0')
				pad = '0';
		}
		if (*f == '*') {
			width = va_arg(ap, int);
			f++;
		}
		for (; *f >= '0' && *f <= '9'; f++)
			width = width * 10 + *f - '0';
		for (; *f == 'l' || *f == 'z'; f++)
			wide++;
		switch (*f) {
		case 'd':
		case 'i': {
			long d = wide ? va_arg(ap, long) : va_arg(ap, int);

			negative = d < 0;
			v = negative ? -(u64)d : (u64)d;
			break;
		}
		case 'u':
			v = wide ? va_arg(ap, u64) : va_arg(ap, u32);
			break;
		case 'p':
			wide = 1;
			alternate = true;
			/* fall through */
		case 'x':
		case 'X':
			base = 16;
			v = wide ? va_arg(ap, u64) : va_arg(ap, u32);
			break;
		case 's':
			text = va_arg(ap, const char *);
			put_padded(s, text, strlen(text), width, left, ' ');
			continue;
		case 'c':
			put(s, va_arg(ap, int));
			continue;
		default:
			put(s, *f);
			continue;
		}
		n = sizeof digits;
		do
			digits[--n] = (*f == 'X' ? "0123456789ABCDEF" : "0123456789abcdef")[v % base];
		while (v /= base);
		if (alternate && base == 16) {
			digits[--n] = 'x';
			digits[--n] = '0';
		}
		if (negative)
			digits[--n] = '-';
		put_padded(s, digits + n, sizeof digits - n, width, left, pad);
	}
}

int vsnprintf(char *to, size_t size, const char *format, va_list ap)
{
	struct sink s = { to, size, 0 };

	format_to(&s, format, ap);
	if (size)
		to[s.n < size ? s.n : size - 1] = 0;
	return s.n;
}

int snprintf(char *to, size_t size, const char *format, ...)
{
	va_list ap;
	int n;

	va_start(ap, format);
	n = vsnprintf(to, size, format, ap);
	va_end(ap);
	return n;
}

int printf(const char *format, ...)
{
	struct sink s = { 0 };
	va_list ap;

	va_start(ap, format);
	format_to(&s, format, ap);
	va_end(ap);
	return s.n;
}

/* ---- claims ---- */

static u32 failures;

bool check(bool cond, const char *name, const char *format, ...)
{
	struct sink s = { 0 };
	va_list ap;

	printf("%s %s ", cond ? "ok" : "FAIL", name);
	va_start(ap, format);
	format_to(&s, format, ap);
	va_end(ap);
	printf("\n");
	failures += !cond;
	return cond;
}

int finish(void) { return failures ? RT_STATUS_FAILED : 0; }
