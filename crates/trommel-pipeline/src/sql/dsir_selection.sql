-- Where each domain's selection ends: at the window whose tokens meet the budget, from the highest key down. Windows of equal
-- text have equal keys and are selected together. A domain whose candidates do not meet the budget has no key_min.
-- in:  candidates(domain, key, tokens)
-- out: domain, key_min, windows, tokens
WITH running AS (
  SELECT domain, key, tokens, sum(tokens) OVER (PARTITION BY domain ORDER BY key DESC) AS total FROM candidates
), ends AS (
  SELECT domain, max(CASE WHEN total >= {budget} THEN key END) AS key_min FROM running GROUP BY domain
)
SELECT ends.domain, ends.key_min, count(*) AS windows, sum(c.tokens) AS tokens
FROM ends JOIN candidates AS c ON c.domain = ends.domain AND (ends.key_min IS NULL OR c.key >= ends.key_min)
GROUP BY ends.domain, ends.key_min ORDER BY ends.domain
