-- What the weights do to each domain. Entropies and divergences are in nats; the divergences compare distributions over
-- the clusters that the corpus can give (lost_mass is the share of the domain that it cannot).
--   kl_before = sum p ln(p / p_corpus), kl_after = sum p ln(p / drawn share); a cluster without a draw counts as half one
--   ess = (sum_x w)^2 / sum_x w^2 over the corpus's windows x, ess_share = ess / windows                       [PE 2.4]
--   capped_share = share of the drawn windows that `max_epochs` moved from capped clusters to others
-- in:  weights(domain, cluster_id, p_domain, p_corpus, weight), histograms(domain, cluster_id, windows, ...),
--      rates(domain, cluster_id, expected_draws, epochs, wanted_draws), drawn(domain, cluster_id, draws, repeats)
-- out: domain, kl_before, kl_after, ess, ess_share, lost_mass, repeat_share, max_epochs, entropy, top_cluster_share,
--      capped_share
WITH joined AS (
  SELECT w.domain, w.p_domain, w.p_corpus, w.weight, CAST(h.windows AS DOUBLE) AS windows,
         r.expected_draws, r.wanted_draws, r.epochs,
         CAST(coalesce(d.draws, 0) AS DOUBLE) AS draws, CAST(coalesce(d.repeats, 0) AS DOUBLE) AS repeats,
         sum(CASE WHEN w.weight > 0 THEN w.p_domain ELSE 0 END) OVER (PARTITION BY w.domain) AS kept,
         CAST(sum(coalesce(d.draws, 0)) OVER (PARTITION BY w.domain) AS DOUBLE) AS all_draws,
         sum(CASE WHEN w.weight > 0 THEN greatest(CAST(coalesce(d.draws, 0) AS DOUBLE), 0.5) ELSE 0 END) OVER (PARTITION BY w.domain) AS counted
  FROM weights AS w
  JOIN histograms AS h ON h.domain = 'corpus' AND h.cluster_id = w.cluster_id
  JOIN rates AS r ON r.domain = w.domain AND r.cluster_id = w.cluster_id
  LEFT JOIN drawn AS d ON d.domain = w.domain AND d.cluster_id = w.cluster_id
)
SELECT domain,
       sum(CASE WHEN weight > 0 THEN p_domain / kept * ln(p_domain / kept / p_corpus) ELSE 0 END) AS kl_before,
       sum(CASE WHEN weight > 0 THEN p_domain / kept * ln(p_domain / kept / (greatest(draws, 0.5) / counted)) ELSE 0 END) AS kl_after,
       power(sum(windows * weight), 2) / sum(windows * weight * weight) AS ess,
       power(sum(windows * weight), 2) / sum(windows * weight * weight) / sum(windows) AS ess_share,
       sum(CASE WHEN weight > 0 THEN 0 ELSE p_domain END) AS lost_mass,
       sum(repeats) / max(all_draws) AS repeat_share,
       max(epochs) AS max_epochs,
       -sum(CASE WHEN p_domain > 0 THEN p_domain * ln(p_domain) ELSE 0 END) AS entropy,
       max(p_domain) AS top_cluster_share,
       sum(greatest(wanted_draws - expected_draws, 0.0)) / sum(expected_draws) AS capped_share
FROM joined GROUP BY domain ORDER BY domain
