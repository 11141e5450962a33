"""A tokenizer for models whose tokens mean nothing."""


class Letters:
    """A tokenizer whose token t is the character of code t + 32."""

    eos_token_id = None

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(32 + i) for i in ids)

    def batch_decode(self, rows, skip_special_tokens=True):
        return [self.decode(row) for row in rows]
