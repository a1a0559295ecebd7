-- How much text lies at each key, to a sixteenth, from the highest down.
-- in:  scores(domain, byte_len, key, ...)
-- out: domain, bin (the lowest key in it, times 16), bytes
SELECT domain, CAST(floor(key * 16) AS BIGINT) AS bin, sum(CAST(byte_len AS BIGINT)) AS bytes
FROM scores WHERE key IS NOT NULL
GROUP BY domain, bin ORDER BY domain, bin DESC
